"""Thousands of fine-tunes over one base model, answered in one batch, over HTTP.

engine/ answers and knows nothing of HTTP; learning/ trains beside it, over twin.py's tree; http/ is the service and
knows nothing of models; replicas.py is the service on several machines. Stands on fleet/ and below. Begin in
engine/interface.py, which is all that they say to each other.
"""
