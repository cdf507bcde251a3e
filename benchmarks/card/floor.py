"""Steps to compare ours with: the floor, and peft's adapters on the same layers.

floor: the same frozen text encoder and U-Net, forward and backward to their inputs; no adapter, no optimizer, and in
       half precision no autocast.
peft:  noise, text encoder, U-Net with peft's adapters in float32, loss, backward, clipping, and AdamW as torch has it
       by default; in half precision with autocast, and in fp16 with a scaler, as scripts with peft train.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import Tensor, nn
    from transformers import CLIPTextModel

UNET_TARGETS = r".*attentions.*(to_[qkv]|to_out\.0|proj_in|proj_out|net\.0\.proj|net\.2)"
CONV_TARGETS = (
    r"(down_blocks|mid_block|up_blocks).*(to_[qkv]|to_out\.0|proj_in|proj_out|net\.0\.proj|net\.2"
    r"|conv1|conv2|conv|conv_shortcut|time_emb_proj)"
)
TEXT_TARGETS = r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
CAPTION = "a photo of a cat"


class Work(NamedTuple):
    """What a step works on; the models are on the device already, in the type of their computations."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel | None  # None: captions are encoded ahead
    batch: int
    side: int  # of the latents
    rank: int
    conv_dim: int = 0  # 0: no adapter on convolutions
    trains_text: bool = True
    checkpointing: bool = False

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype


def token_ids(captions: list[str]) -> Tensor:
    """Return the padded token ids (B, 77) of captions."""
    from library.models.tokenizer import WINDOW, load_clip_tokenizer

    tokens = load_clip_tokenizer()(captions, padding="max_length", max_length=WINDOW, return_tensors="pt")
    return tokens.input_ids


def random_latents(work: Work) -> Tensor:
    """Return latents (B, 4, side, side) in the type of the U-Net."""
    import torch

    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(work.batch, 4, work.side, work.side, generator=generator)
    return latents.to(work.device, work.dtype)


def encoded_ahead(work: Work) -> Tensor:
    """Return random hidden states (B, 77, D) in the place of encoded captions."""
    import torch

    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(work.batch, 77, work.unet.config["cross_attention_dim"], generator=generator)
    return hidden.to(work.device, work.dtype)


def told_sizes(work: Work) -> dict[str, Any]:
    """Return the further arguments of an SDXL U-Net: a pooled output, and the sizes of the pictures."""
    import torch

    config = work.unet.config
    if config.get("addition_embed_type") != "text_time":
        return {}
    sizes = torch.full((work.batch, 6), work.side * 8, device=work.device, dtype=work.dtype)
    width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    pooled = torch.zeros(work.batch, width, device=work.device, dtype=work.dtype)
    return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}


def make_floor(work: Work) -> Callable[[], object]:
    """Return a function that makes a step of the floor."""
    import torch

    if work.checkpointing:
        work.unet.enable_gradient_checkpointing()
    tokens = token_ids([CAPTION] * work.batch).to(work.device)
    latents = random_latents(work).requires_grad_()
    timesteps = torch.full((work.batch,), 500, device=work.device)
    ahead = encoded_ahead(work) if work.text_encoder is None else None
    sizes = told_sizes(work)

    def encode() -> Tensor:
        if work.text_encoder is None:
            assert ahead is not None
            return ahead
        if not work.trains_text:
            with torch.no_grad():
                return work.text_encoder(tokens).last_hidden_state
        # Gradients reach the first layer's input, as they do in training.
        embeddings = work.text_encoder.get_input_embeddings()
        handle = embeddings.register_forward_hook(lambda module, given, out: out.requires_grad_())
        hidden = work.text_encoder(tokens).last_hidden_state
        handle.remove()
        return hidden

    def step() -> None:
        work.unet(latents, timesteps, encode(), **sizes).sample.float().square().mean().backward()
        latents.grad = None

    return step


def make_peft(work: Work) -> Callable[[], object]:
    """Return a function that makes a step with peft; changes the models of the work."""
    import torch
    from peft.tuners.lora import LoraModel

    from library.diffusion.schedule import stable_diffusion_schedule

    trained: list[nn.Module] = [work.unet]
    LoraModel(work.unet, lora_config(work, CONV_TARGETS if work.conv_dim else UNET_TARGETS), "default")
    if work.trains_text and work.text_encoder is not None:
        LoraModel(work.text_encoder, lora_config(work, TEXT_TARGETS), "default")
        trained.append(work.text_encoder)
    if work.checkpointing:
        work.unet.enable_gradient_checkpointing()
    parameters = [parameter for model in trained for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    dtype, device = work.dtype, work.device
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    schedule = stable_diffusion_schedule().to(device)
    latents, sizes = random_latents(work), told_sizes(work)
    ahead = encoded_ahead(work) if work.text_encoder is None else None

    def encode() -> Tensor:
        if work.text_encoder is None:
            assert ahead is not None
            return ahead
        with torch.set_grad_enabled(work.trains_text):
            return work.text_encoder(token_ids([CAPTION] * work.batch).to(device)).last_hidden_state

    def step() -> None:
        noise, timesteps = torch.randn_like(latents), torch.randint(1000, (work.batch,), device=device)
        noisy = schedule.add_noise(latents, noise, timesteps).to(dtype)
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            prediction = work.unet(noisy, timesteps, encode(), **sizes).sample
        scaler.scale((prediction.float() - noise.float()).square().mean()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def lora_config(work: Work, targets: str) -> Any:
    """Return peft's configuration of adapters on layers, without its own autocast."""
    from peft import LoraConfig

    return LoraConfig(r=work.rank, lora_alpha=1, target_modules=targets)
