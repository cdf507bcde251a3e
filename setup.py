"""For `pip install -e .`; the scripts run from a clone without it."""

from setuptools import setup

setup(
    name="sd-lora-suite",
    version="0.1.0",
    description="Train LoRA networks for Stable Diffusion from the command line; draw with them, merge, convert",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "finetune",
        "library",
        "library.adapters",
        "library.config",
        "library.data",
        "library.diffusion",
        "library.generation",
        "library.models",
        "library.optim",
        "library.sampling",
        "library.training",
        "networks",
        "tools",
    ],
    package_data={"library.models": ["clip_vocabulary/*"]},
    install_requires=[
        "torch>=2.11",
        "diffusers>=0.38",
        "transformers>=5.6",
        "accelerate>=1.10",
        "safetensors>=0.5",
        "numpy>=2.0",
        "opencv-python-headless>=4.10",
        "pillow>=11.0",
        "tqdm>=4.66",
        "toml>=0.10.2; python_version < '3.11'",
    ],
    extras_require={
        "optimizers": ["pytorch-optimizer>=4.0"],
        "bitsandbytes": ["bitsandbytes>=0.49"],
        "tensorboard": ["tensorboard>=2.16"],
        "wandb": ["wandb>=0.31"],
        "xformers": ["xformers>=0.0.33"],
    },
)
