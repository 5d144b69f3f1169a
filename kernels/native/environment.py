"""What the environment of a process that computes on the CPU should hold before torch is imported there.

The kernels have threads of their own (`thread_pool.py`); what torch's own operators leave on OpenMP's must not spin for
long after them, since the kernels' threads and the server's process want the cores. Imports nothing.
"""

ENVIRONMENT: dict[str, str] = {
    "GOMP_SPINCOUNT": "2000",  # some 10 us; the default, active waiting, is milliseconds of a core after each region
    "MKL_THREADING_LAYER": "GNU",  # one OpenMP runtime in the process
}
"""Set each of these unless the user has set it."""
