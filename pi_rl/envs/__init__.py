"""Simulators behind one chunked, vectorised interface: processes, shared memory, several tasks in one environment."""
