"""Library of the suite: everything that the entry scripts share."""

NAME = "sd-lora-suite"
VERSION = "0.1.0"  # read by pyproject.toml
