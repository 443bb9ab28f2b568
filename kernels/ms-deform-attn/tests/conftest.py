"""The mark that tells kernel-builder which tests to run on its machines."""


def pytest_configure(config):
    """Register the mark."""
    config.addinivalue_line("markers", "kernels_ci: run by kernel-builder on its machines")
