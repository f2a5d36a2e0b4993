"""`sab::linear` on CPUs: C, compiled at installation, called through ctypes."""
