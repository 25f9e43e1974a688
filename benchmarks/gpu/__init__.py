"""The sections of `gpu_session.py`."""
