"""The package itself: lean to import, its public names there when they are asked for."""

from __future__ import annotations

import subprocess
import sys

import kron_kernels


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, kron_kernels; dir(kron_kernels); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_public_name_registers_every_op() -> None:
    code = (
        "from kron_kernels import kron_matmul; import sys, torch; ops = torch.ops.kron_kernels\n"
        "names = 'matmul matmul_backward addmm addmm_ matmul_norm ffn ffn_backward qkv embedding embedding_backward'\n"
        "[getattr(ops, f'kron_{name}').default for name in names.split()]; sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    assert set(kron_kernels.__all__) <= set(dir(kron_kernels))
    for name in kron_kernels.__all__:
        assert getattr(kron_kernels, name) is not None
    assert not hasattr(kron_kernels, "pack_factors")
