"""The parts of `cpu_session.py`."""
