"""Eight devices on the host, for the tests that use meshes; the others use the first."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
