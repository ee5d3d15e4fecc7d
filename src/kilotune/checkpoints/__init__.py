"""An adapter's two files: adapter_config.json and adapter_model.safetensors, in PEFT's layout.

files.py reads and writes them with care, peft_layout.py is what is in them, saving.py writes a model's adapters.
Stands on injection/ and all below it; begin in peft_layout.py. (The state of a training that goes on is another thing:
train/trainer/output_folder.py.)
"""
