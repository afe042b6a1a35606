"""The tests here need packages that nothing else does: `make parity`, `make tpu` and `make gpu` install them. Elsewhere they are not collected."""

import importlib.util

NEEDS = {"test_bench.py": "torch", "test_gpu.py": "jax_cuda12_plugin", "test_peft.py": "peft", "test_torch.py": "torch", "test_tpu.py": "libtpu"}
collect_ignore_glob = [name for name, package in NEEDS.items() if importlib.util.find_spec(package) is None]
