"""Joint training: adapters of many users, trained in batches that mix them, each as if it were trained alone.

Stands on bank/ and store/. Begin in joint_training.py; mixed_pass.py is one forward and backward of many users' rows.
"""
