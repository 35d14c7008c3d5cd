"""Maps three folders into one wheel; everything else is in pyproject.toml.

`llmmpq/` is the toolkit, `recipes/` ships as `llmmpq.recipes`, and `kernels/torch-ext/` (a kernel-builder
project of its own) ships as `llmmpq_kernels`.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["llmmpq", "llmmpq.*"]),
        "llmmpq.recipes",
        *find_packages("kernels/torch-ext"),
    ],
    package_dir={
        "llmmpq.recipes": "recipes",
        "llmmpq_kernels": "kernels/torch-ext/llmmpq_kernels",
    },
)
