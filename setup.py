"""Finds the packages; everything else about the distribution is in pyproject.toml.

`kernels/` lies beside the package in the tree and inside it (`flexolmo_jax.kernels`) once
installed. The tree's symlink `flexolmo_jax/kernels -> ../kernels` serves uninstalled checkouts; it
is skipped here, so that the folder is packaged once.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(
            include=["flexolmo_jax", "flexolmo_jax.*"],
            exclude=["flexolmo_jax.kernels", "flexolmo_jax.kernels.*"],
        ),
        "flexolmo_jax.kernels",
        *(f"flexolmo_jax.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"flexolmo_jax.kernels": "kernels"},
)
