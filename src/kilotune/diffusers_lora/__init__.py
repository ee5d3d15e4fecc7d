"""LoRA files of diffusers and of kohya's trainers: one file for several models of a pipeline, their alphas kept.

keys.py takes the file's keys apart; names.py finds the layers that they mean, original_names.py those that are called
as in a model's first release; translating.py makes an adapter of our files of each model's part. Of these none knows
models. loading.py and saving.py are the way in and out. diffusers itself is not needed.
"""
