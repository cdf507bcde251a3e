"""For tools that expect this file; pyproject.toml has everything."""

from setuptools import setup

setup()
