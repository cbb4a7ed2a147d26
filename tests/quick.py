"""Prints the XLA_FLAGS with which tests compile in a third of the time, as far as the installed jaxlib knows them.

Most of the time of the tests goes into compiling tiny programs that run once. The flags leave out what makes a program
fast (optimised machine code, kernels by way of MLIR) and what pays for large ones (code made in 32 pieces). What is
computed stays the same but for rounding; `make test-reference`, the README's example and the notebooks run without.
"""

from __future__ import annotations

import jax

FLAGS: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": "1",
}


def known(name: str, value: str | bool) -> bool:
    """True if this jaxlib has the flag: an unknown one in XLA_FLAGS would end the process."""
    try:
        jax.jit(lambda x: x).lower(0.0).compile({name: value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


if __name__ == "__main__":
    print(*(f"--{name}={str(value).lower()}" for name, value in FLAGS.items() if known(name, value)))
