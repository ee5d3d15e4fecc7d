"""The parts that are classes of vLLM's own kind; to be imported where vLLM is."""
