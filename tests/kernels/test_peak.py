from llmc_cli.kernels.peak import matmul_flops


def test_matmul_flops_is_positive(backend):
    assert matmul_flops(backend.kernels, 16, 16, 16) > 0
