"""An adapter's two files: adapter_config.json and adapter_model.safetensors, in PEFT's layout.

files.py reads and writes bytes with care; peft_layout.py has the layout's names; reading.py makes an adapter of two
files, fitting.py holds it against a model, writing.py is the way out. Stands on injection/ and below; begin in
reading.py. (The state of a training that goes on is another thing: train/trainer/output_folder.py.)
"""
