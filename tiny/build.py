"""Train the embedded laboratory from nothing: VAE, CLIP, UNet, PickScore and the step-aware judge.

    python -m tiny.build                          # all, into tiny/: 2 to 3 h on 2 slow cores
    python -m tiny.build --stages spm --out DIR   # one stage again, on what the folder holds

The hours are estimated from single steps. Every stage is seeded, ends with a quality gate that
stops the build if it is missed, and writes its part of the checkpoint in the layout of an official
one. Held-out captions (`world.split_captions`) appear in no stage.
"""
import itertools
import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import needs  # noqa: F401
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import ddim
from clip_spm import CLIP, CLIPConfig, preference_loss, preprocess_decoded
from diffusion import generate
from loading import (
    TINY,
    first_tokenizer,
    load_clip,
    load_pipeline,
    part_of,
    read_schedule,
)
from pairs import Pairs
from spm_train import PRESETS, Setting, SPMConfig, accuracy_table
from tiny import world
from training import opt, parse_options, run_script, start_processes, write_json, write_text
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from weights import read_json

VAE_CONFIG = dict(
    _class_name="AutoencoderKL", in_channels=3, out_channels=3, latent_channels=4,
    sample_size=world.SIZE, block_out_channels=[16, 32, 32, 64], layers_per_block=1,
    norm_num_groups=8, act_fn="silu", down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=1.0,
)
UNET_CONFIG = dict(
    _class_name="UNet2DConditionModel", sample_size=world.SIZE // 8, in_channels=4, out_channels=4,
    layers_per_block=1, block_out_channels=[64, 96],
    down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2,
    cross_attention_dim=96, attention_head_dim=4, norm_num_groups=16, norm_eps=1e-5, act_fn="silu",
    flip_sin_to_cos=True, freq_shift=0, downsample_padding=1, mid_block_scale_factor=1,
    center_input_sample=False,
)
SCHEDULER_CONFIG = dict(
    _class_name="DDIMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    num_train_timesteps=1000, set_alpha_to_one=False, clip_sample=False, steps_offset=1,
    prediction_type="epsilon", timestep_spacing="leading",
)
FLOW_SCHEDULER_CONFIG = dict(_class_name=ddim.FLOW, num_train_timesteps=1000, shift=1.0)
MODEL_INDEX = dict(
    _class_name="StableDiffusionPipeline", feature_extractor=[None, None],
    safety_checker=[None, None], image_encoder=[None, None], requires_safety_checker=False,
    scheduler=["diffusers", "DDIMScheduler"], text_encoder=["transformers", "CLIPTextModel"],
    tokenizer=["transformers", "CLIPTokenizer"], unet=["diffusers", "UNet2DConditionModel"],
    vae=["diffusers", "AutoencoderKL"],
)
TEXT_CONFIG = dict(
    architectures=["CLIPTextModel"], model_type="clip_text_model", hidden_size=96,
    intermediate_size=384, projection_dim=64, num_hidden_layers=2, num_attention_heads=4,
    hidden_act="quick_gelu", layer_norm_eps=1e-5, max_position_embeddings=16,
)
VISION_CONFIG = dict(
    model_type="clip_vision_model", hidden_size=128, intermediate_size=512, projection_dim=64,
    num_hidden_layers=3, num_attention_heads=4, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    image_size=world.SIZE, patch_size=8,
)
VAE_FILE, UNET_FILE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("vae", "unet"))
UNSEEN = 2000                           # CLIP's last pictures, which only its gate looks at


def pictures(
    count: int, seed: int, shares: tuple[float, ...] = (0.2, 0.2, 0.6)
) -> tuple[torch.Tensor, list[world.Caption]]:
    """`count` training pictures as uint8 [N, 3, S, S], and captions drawn by these `shares`."""
    generator = torch.Generator().manual_seed(seed)
    captions = world.draw_captions(count, generator, shares)
    parts = [captions[i:i + 256] for i in range(0, count, 256)]
    images = [(world.render(part, generator) * 255).round().byte() for part in parts]
    return torch.cat(images), captions


def to_model(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures -> [-1, 1] as the VAE wants them."""
    return images.float() / 127.5 - 1


def bf16(device: torch.device) -> torch.autocast:
    """Half precision on a GPU; on a CPU that lacks it a step takes ten times as long."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    angle = math.pi * (step - warmup) / max(steps - warmup, 1)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(angle)))


def update(progress: tqdm, optimizer: torch.optim.Optimizer, loss: torch.Tensor,
           lr: float) -> None:
    """One step down the gradient of the loss, whose norm is bounded by 1; its bar says the loss."""
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    progress.set_postfix(loss=f"{loss:.4f}", refresh=False)


def save_weights(state: dict[str, torch.Tensor], file: Path) -> None:
    """Tensors of any device into a safetensors file."""
    save_file({k: v.cpu().contiguous() for k, v in state.items()}, file)


def gate(name: str, value: float, least: float) -> None:
    """Print a stage's quality; SystemExit if it is not reached."""
    print(f"gate  {name}: {value:.4f} (at least {least})", flush=True)
    if value < least:
        raise SystemExit(
            f"tiny.build: {name} is {value:.4f}, below {least}; "
            "later stages would rest on it. Stopped."
        )


def build_vae(
    out: Path, device: torch.device, seed: int, steps: int = 2800, batch: int = 32
) -> None:
    """Autoencoder: L1, L1 of the pixel gradients (crisp edges), a light KL towards N(0, 1)."""
    torch.manual_seed(seed)
    images, _ = pictures(16_000, seed + 1)
    vae = VAE(VAEConfig.from_json(VAE_CONFIG)).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    progress = tqdm(range(steps), desc="vae", mininterval=5)
    for step in progress:
        x = to_model(images[torch.randint(len(images), (batch,))]).to(device)
        with bf16(device):
            mean, std = (moment.float() for moment in vae.moments(x))
            y = vae.decode(mean + std * torch.randn_like(std)).float()
        difference = y - x
        edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        l1 = difference.abs().mean()        # last: autograd sums gradients in the graph's order
        update(progress, optimizer, l1 + 0.5 * edges + 1e-3 * kl,
               learning_rate(step, steps, 2e-3))
    mean, _ = encode(vae.eval(), images[:4096])
    config = dict(VAE_CONFIG, scaling_factor=round(float(1 / mean.std()), 5))
    write_json(out / "vae/config.json", config)
    save_weights(vae.state_dict(), out / VAE_FILE)
    check_vae(out, device, seed)


@torch.no_grad()
def encode(vae: VAE, images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures [N, 3, S, S] -> [2, N, C, H, W]: mean and std of their latents, not scaled."""
    device = next(vae.parameters()).device
    moments = [torch.stack(vae.moments(to_model(x).to(device))) for x in images.split(256)]
    return torch.cat(moments, dim=1)


def load_vae(out: Path, device: torch.device) -> VAE:
    """The autoencoder of an earlier stage, in evaluation mode."""
    vae = VAE(VAEConfig.from_json(read_json(out / "vae/config.json"))).to(device).eval()
    vae.load_state_dict(load_file(out / VAE_FILE))
    return vae


@torch.no_grad()
def check_vae(out: Path, device: torch.device, seed: int) -> None:
    """Gate: truth survives the autoencoder. Also the ceiling: the best pictures, decoded."""
    vae = load_vae(out, device)
    generator = torch.Generator().manual_seed(seed + 2)
    _, captions = pictures(512, seed + 3)
    for name, factors in (("real", []), ("best", [torch.ones(512)] * 2)):
        images = world.render(captions, generator, *factors)
        again = vae.decode(vae.encode(images.to(device) * 2 - 1)).cpu() / 2 + 0.5
        true, aligned = (world.alignment(x, captions).mean() for x in (images, again))
        beauty = torch.stack([world.aesthetics(x) for x in (again, images)])
        print(
            f"vae   {name}: alignment {true:.3f} -> {aligned:.3f}, "
            f"aesthetics {beauty[1].mean():.2f} -> {beauty[0].mean():.2f}, "
            f"L1 {(again - images).abs().mean():.4f}", flush=True,
        )
        if name == "real":
            gate("VAE alignment of real pictures", float(aligned), 0.95)
            gate("VAE aesthetics correlation", float(torch.corrcoef(beauty)[0, 1]), 0.95)


def build_tokenizer(out: Path) -> None:
    """A CLIP byte-pair tokenizer, its merges learnt from the captions: every word is one token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = {" ".join(word) + "</w>" for c in world.all_captions() for word in c.text.split()}
    merges = []
    while any(" " in word for word in words):
        pairs = [" ".join(pair) for word in words for pair in itertools.pairwise(word.split())]
        merges.append(max(sorted(set(pairs)), key=pairs.count))
        pattern = re.compile(rf"(?<!\S){re.escape(merges[-1])}(?!\S)")
        words = {pattern.sub(merges[-1].replace(" ", ""), word) for word in words}
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokens = symbols + [s + "</w>" for s in symbols] + [m.replace(" ", "") for m in merges]
    special = dict(bos_token=start, eos_token=end, pad_token=end, unk_token=end)
    write_json(out / "tokenizer/vocab.json", {t: i for i, t in enumerate([*tokens, start, end])})
    write_text(out / "tokenizer/merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    write_json(out / "tokenizer/special_tokens_map.json", special)
    write_json(out / "tokenizer/tokenizer_config.json", dict(
        special, tokenizer_class="CLIPTokenizer",
        model_max_length=TEXT_CONFIG["max_position_embeddings"],
        add_prefix_space=False, do_lower_case=True, errors="replace",
    ))


def tokenize(source: str, texts: list[str]) -> torch.Tensor:
    """Token ids [N, L], padded, through the same tokenizer class as the official models."""
    return first_tokenizer(source)(texts, padding="max_length", truncation=True,
                                   return_tensors="pt").input_ids


def clip_json(out: Path) -> dict:
    """The tiny CLIP's config.json; the vocabulary size is the tokenizer's."""
    n = len(read_json(out / "tokenizer/vocab.json"))
    ids = dict(vocab_size=n, bos_token_id=n - 2, eos_token_id=n - 1, pad_token_id=n - 1)
    return dict(
        architectures=["CLIPModel"], model_type="clip", projection_dim=64,
        text_config=dict(TEXT_CONFIG, **ids), vision_config=VISION_CONFIG,
    )


def save_clip(clip: CLIP, folder: Path, config: dict) -> None:
    """Weights and configuration in transformers' layout."""
    write_json(folder / "config.json", config)
    save_weights(clip.state_dict(), folder / "model.safetensors")


def image_features(clip: CLIP, images: torch.Tensor) -> torch.Tensor:
    """Features [N, P] of uint8 pictures [N, 3, S, S]."""
    pixels = to_model(images).to(clip.logit_scale.device)
    return clip.image_features(preprocess_decoded(pixels, world.SIZE))


def indices(captions: list[world.Caption], train: list[world.Caption]) -> torch.Tensor:
    """Where each of the captions stands among those of training -> [N]."""
    place = {c: i for i, c in enumerate(train)}
    return torch.tensor([place[c] for c in captions])


def contrastive_loss(
    clip: CLIP, eyes: torch.Tensor, words: torch.Tensor, captions: torch.Tensor
) -> torch.Tensor:
    """CLIP's loss of N pictures [N, P] among 2 N captions [2 N, P]: their own, then wrong ones.

    `captions` [2 N] tells them apart: two pictures of one caption are no negatives of each other.
    """
    n = len(eyes)
    same = (captions == captions[:n, None]).fill_diagonal_(False).to(eyes.device)
    logits = (clip.logit_scale.exp() * eyes @ words.T).masked_fill(same, -1e4)          # [N, 2 N]
    labels = torch.arange(n, device=eyes.device)
    return 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits[:, :n].T, labels))


def build_clip(
    out: Path, device: torch.device, seed: int, steps: int = 1500, batch: int = 128
) -> None:
    """Contrastive training on pictures and captions, one hard wrong caption for each picture."""
    build_tokenizer(out)
    config = clip_json(out)
    torch.manual_seed(seed + 10)
    clip = CLIP(CLIPConfig.from_json(config)).to(device)
    for module in clip.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)
    images, captions = pictures(20_000, seed + 11)
    train, _ = world.split_captions()
    ids = tokenize(str(out), [c.text for c in train]).to(device)
    target = indices(captions, train)
    rand = torch.Generator().manual_seed(seed + 12)
    wrong = [world.mistaken(c, train, rand) for c in train for _ in range(16)]
    hard = indices(wrong, train).view(-1, 16)
    optimizer = torch.optim.AdamW(clip.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    progress = tqdm(range(steps), desc="clip", mininterval=5)
    for step in progress:
        pick = torch.randint(len(images) - UNSEEN, (batch,))
        right = target[pick]
        both = torch.cat([right, hard[right, torch.randint(16, (batch,))]])
        with bf16(device):
            eyes = image_features(clip, images[pick])
            words = clip.text_features(ids[both])
        loss = contrastive_loss(clip, eyes, words, both)
        update(progress, optimizer, loss, learning_rate(step, steps, 1.5e-3))
        clip.logit_scale.data.clamp_(0, math.log(100))
    clip.eval()
    save_clip(clip, out.parent / "work/clip", config)       # PickScore starts from it; not shipped
    text = CLIP(CLIPConfig.from_json(config["text_config"]))
    text.text_model.load_state_dict(clip.text_model.state_dict())
    save_clip(text, out / "text_encoder", config["text_config"])
    with torch.no_grad():
        eyes = image_features(clip, images[-UNSEEN:])
        unseen = target[-UNSEEN:]
        right = clip.score(eyes, clip.text_features(ids[unseen]))
        wrong = clip.score(eyes, clip.text_features(ids[hard[unseen, 0]]))
    gate("CLIP right against nearly right caption", float((right > wrong).float().mean()), 0.9)


def build_unet(out: Path, device: torch.device, seed: int) -> None:
    """The denoiser alone, on the frozen text encoder: what things look like, how many there are."""
    write_json(out / "model_index.json", MODEL_INDEX)
    write_json(out / "scheduler/scheduler_config.json", SCHEDULER_CONFIG)
    write_json(out / "unet/config.json", UNET_CONFIG)
    torch.manual_seed(seed + 20)
    unet = UNet(UNetConfig.from_json(UNET_CONFIG)).to(device)
    for module in unet.modules():       # each branch starts as nothing, so that depth does not hurt
        if isinstance(module, type(unet.mid_block.resnets[0])):
            torch.nn.init.zeros_(module.conv2.weight)
    torch.nn.init.zeros_(unet.conv_out.weight)
    data = latents(out, device, *pictures(32_000, seed + 21))
    train_unet(out, unet, data, steps=4600, peak=1.5e-3)
    check_unet(out, device, least=0.4)


def build_joint(out: Path, device: torch.device, seed: int) -> None:
    """Denoiser and text encoder together, mostly on relations.

    CLIP's loss looks at the end token alone, so the others hardly say which thing stands where, and
    the stage before gets it right half of the time. The words learn it here.
    """
    torch.manual_seed(seed + 22)
    unet = UNet(UNetConfig.from_json(UNET_CONFIG)).to(device)
    unet.load_state_dict(load_file(out / UNET_FILE))
    data = latents(out, device, *pictures(24_000, seed + 23, (0.08, 0.12, 0.8)))
    train_unet(out, unet, data, steps=2400, peak=1e-3, train_text=True)
    check_unet(out, device, least=0.8)


def build_flow(out: Path, device: torch.device, seed: int) -> None:
    """A sister that matches a flow: the denoiser, trained on to say eps - x_0 of another path.

    It starts from the packed UNet, whose time embedding is first moved to where the same share of
    the signal is left. VAE, text encoder and tokenizer are shared.
    """
    flow = out.parent / "flow"
    index = MODEL_INDEX | dict(scheduler=["diffusers", ddim.FLOW], shared=f"../{out.name}")
    write_json(flow / "model_index.json", index)
    write_json(flow / "scheduler/scheduler_config.json", FLOW_SCHEDULER_CONFIG)
    write_json(flow / "unet/config.json", UNET_CONFIG)
    torch.manual_seed(seed + 24)
    unet = UNet(UNetConfig.from_json(UNET_CONFIG)).to(device)
    unet.load_state_dict({k: v.float() for k, v in load_file(out / UNET_FILE).items()})
    move_time(unet, ddim.Schedule.from_json(FLOW_SCHEDULER_CONFIG))
    data = latents(out, device, *pictures(24_000, seed + 25, (0.12, 0.16, 0.72)))
    train_unet(flow, unet, data, steps=1300, peak=1e-3)
    save_weights({k: v.half() for k, v in load_file(flow / UNET_FILE).items()}, flow / UNET_FILE)
    check_unet(flow, device, least=0.95, scales=(1.0, 2.0, 3.0))


def move_time(unet: UNet, schedule: ddim.Schedule, steps: int = 400) -> None:
    """Fit the time embedding of a flow's timesteps to what it was at the same share of signal."""
    timestep = torch.arange(0.0, 1001.0)
    with torch.no_grad():
        wanted = unet.embed_time(ddim.told(schedule, timestep, by_flow=False), None, None)
    optimizer = torch.optim.Adam(unet.time_embedding.parameters())
    progress = tqdm(range(steps), desc="time", mininterval=5)
    for step in progress:
        loss = (unet.embed_time(timestep, None, None) - wanted).square().mean()
        update(progress, optimizer, loss, learning_rate(step, steps, 2e-3))


def latents(
    out: Path, device: torch.device, images: torch.Tensor, captions: list[world.Caption]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures -> mean and std [N, C, H, W] of their scaled latents, captions' indices [N]."""
    vae = load_vae(out, device)
    train, _ = world.split_captions()
    mean, std = encode(vae, images) * vae.config.scaling_factor
    return mean, std, indices(captions, train).to(device)


def train_unet(
    out: Path,
    unet: UNet,
    data: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    steps: int,
    peak: float,
    train_text: bool = False,
    batch: int = 64,
) -> None:
    """Denoising of `latents` on the path of `out`, weights averaged (EMA) and written there.

    10 % of the captions are dropped for guidance. `train_text`: the text encoder learns too.
    """
    mean, std, target = data
    device = mean.device
    encoder = part_of(out, "text_encoder")
    text = CLIP(CLIPConfig.from_json(read_json(encoder / "config.json"))).to(device)
    text.load_state_dict(load_file(encoder / "model.safetensors"))
    train, _ = world.split_captions()
    ids = tokenize(str(out), [c.text for c in train] + [""]).to(device)     # the last row: dropped
    with torch.no_grad():
        embeds = text.text_model(ids)[1]
    schedule = read_schedule(out)
    trained = [unet, text] if train_text else [unet]
    live = [v for module in trained for v in module.state_dict().values()]
    average = [v.clone() for v in live]
    optimizer = torch.optim.AdamW(
        [p for module in trained for p in module.parameters()],
        betas=(0.9, 0.99), weight_decay=1e-3, fused=True,
    )
    progress = tqdm(range(steps), desc="unet", mininterval=5)
    for step in progress:
        pick = torch.randint(len(mean), (batch,), device=device)
        x_0 = mean[pick] + std[pick] * torch.randn_like(mean[pick])
        noise = torch.randn_like(x_0)
        if schedule.flow:
            timestep = 1000 * torch.rand(batch, device=device)
        else:
            timestep = torch.randint(0, 1000, (batch,), device=device)
        words = torch.where(torch.rand(batch, device=device) < 0.1, len(train), target[pick])
        prompt_embeds = text.text_model(ids[words])[1] if train_text else embeds[words]
        with bf16(device):
            x_t = ddim.add_noise(schedule, x_0, noise, timestep)
            noise_pred = unet(x_t, timestep, prompt_embeds)
        right = ddim.target(schedule, x_0, noise, timestep)
        loss = (noise_pred.float() - right).square().mean()
        update(progress, optimizer, loss, learning_rate(step, steps, peak, warmup=200))
        decay = min(0.998 if train_text or schedule.flow else 0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(average, live, 1 - decay)
        if train_text and step % 800 == 799:
            save_average(out, unet, text, average)
            check_unet(out, device, least=0, scales=(3.0,))
    save_average(out, unet, text, average)


def save_average(out: Path, unet: UNet, text: CLIP, average: list[torch.Tensor]) -> None:
    """Write the averaged weights: the UNet's, after them the text encoder's if they are there."""
    names = list(unet.state_dict())
    save_weights(dict(zip(names, average)), out / UNET_FILE)
    if len(average) > len(names):
        copy = CLIP(text.config)
        copy.load_state_dict(dict(zip(text.state_dict(), average[len(names):])))
        save_clip(copy, out / "text_encoder", read_json(out / "text_encoder/config.json"))


def check_unet(
    out: Path, device: torch.device, least: float, scales: tuple[float, ...] = (2.0, 3.0, 5.0)
) -> None:
    """Gate: the base model draws most captions right at one of these scales of guidance."""
    pipe = load_pipeline(str(out), device=device)
    _, held = world.split_captions()
    aligned = []
    for scale in scales:
        images = generate(
            pipe, [c.text for c in held], list(range(len(held))), 64, guidance_scale=scale, eta=1.0
        )
        aligned.append(float(world.alignment(images, held).mean()))
        print(
            f"unet  held-out captions, guidance {scale}: alignment {aligned[-1]:.3f}, "
            f"aesthetics {world.aesthetics(images).mean():.2f}", flush=True,
        )
    gate("base alignment on held-out captions", max(aligned), least)


def build_pickscore(
    out: Path, device: torch.device, seed: int, steps: int = 1300, batch: int = 64
) -> None:
    """PickScore: CLIP fine-tuned on generic preferences between clean pictures.

    At too high a rate it forgets captions.
    """
    clip = load_clip(str(out.parent / "work/clip"), device=device).requires_grad_(True)
    images, captions, labels = world.preference_pairs(20_000, seed + 31)
    ids = tokenize(str(out), captions).to(device)
    torch.manual_seed(seed + 30)
    optimizer = torch.optim.AdamW(clip.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    train = len(images) - 1000

    def scores(pick: torch.Tensor) -> torch.Tensor:
        eyes = image_features(clip, images[pick].flatten(0, 1))
        words = clip.text_features(ids[pick])
        return clip.score(eyes, words.repeat_interleave(2, 0)).view(-1, 2)

    progress = tqdm(range(steps), desc="pickscore", mininterval=5)
    for step in progress:
        pick = torch.randint(train, (batch,))
        first, second = scores(pick).unbind(1)
        loss = preference_loss(first, second, labels[pick].to(device)).mean()
        update(progress, optimizer, loss, learning_rate(step, steps, 2e-4, warmup=30))
    with torch.no_grad():
        unseen = torch.arange(train, len(images))
        first, second = torch.cat([scores(part) for part in unseen.split(250)]).cpu().unbind(1)
    save_clip(clip.eval(), out / "pickscore", clip_json(out))
    right = (first > second) == (labels[unseen] > 0.5)
    gate("PickScore accuracy on unseen pairs", float(right.float().mean()), 0.75)


def judge_table(
    folder: str, models: dict[str, CLIP], count: int, seed: int, device: str = "cpu"
) -> dict[str, dict]:
    """spm_train's table of the models' accuracies on `count` pairs of their own seed.

    `folder`: the checkpoint whose latents and noise it is.
    """
    pipe = load_pipeline(folder, device=device)
    images, captions, labels = world.preference_pairs(count, seed)
    pairs = Pairs(captions, labels, torch.ones(count), [range(count)], lambda i: images[i])
    config = SPMConfig(**PRESETS["tiny"], seed=seed)
    # The first model says what size of pictures all are shown.
    setting = Setting(pipe, [*models.values()][0], pairs, config, start_processes(device))
    return accuracy_table(setting, models, list(range(count)))


def build_spm(out: Path, device: torch.device, seed: int) -> None:
    """The step-aware preference model and its step-blind twin, by `spm_train.py` as anybody's."""
    run = out.parent / "work/spm"
    shutil.rmtree(run, ignore_errors=True)
    options = ["--out", str(run), "--seed", str(seed), "--device", device.type]
    subprocess.run([sys.executable, "spm_train.py", *options], check=True, cwd=ROOT)
    for name in ("spm", "spm_step_blind"):
        shutil.copytree(run / name, out / name, dirs_exist_ok=True)
    models = {
        "PickScore": load_clip(str(out / "pickscore"), device=device),
        "SPM": load_clip(str(out / "spm"), device=device),
    }
    table = judge_table(str(out), models, 2048, 30_000, str(device))
    for t, (_, _, _, difference, error) in table["SPM"].items():
        least = 2.0 if t in (251, 501) else -1.0            # clearly better there, nowhere worse
        margin = difference / max(error, 1e-6)
        gate(f"SPM minus PickScore at t = {t}, in paired standard errors", margin, least)


def pack(out: Path, device: torch.device, seed: int) -> None:
    """UNet and VAE in half precision: all stays below 25 MB, what they draw does not change."""
    for file in (out / UNET_FILE, out / VAE_FILE):
        save_weights({k: v.half() for k, v in load_file(file).items()}, file)
    check_vae(out, device, seed)
    check_unet(out, device, least=0.8, scales=(3.0,))


def write_prompts(out: Path) -> None:
    """The two prompt lists, so that every script reads them like anybody's."""
    train, held = world.split_captions()
    write_text(out / "train_prompts.txt", "".join(c.text + "\n" for c in train))
    write_text(out / "held_out_prompts.txt", "".join(c.text + "\n" for c in held))


STAGES = {
    "vae": build_vae, "clip": build_clip, "unet": build_unet, "joint": build_joint,
    "pickscore": build_pickscore, "spm": build_spm, "pack": pack, "flow": build_flow,
}


@dataclass
class BuildConfig:
    """What to build, and where."""
    out: str = opt(str(TINY), "folder of the checkpoint")
    stages: tuple[str, ...] = opt(tuple(STAGES), "which parts, in this order", tuple(STAGES))
    seed: int = opt(0, "every random number is keyed by it", least=0)
    device: str = opt("", "cpu or cuda; empty: a GPU if there is one")


def main() -> None:
    """Run the stages asked for, and say how long each took."""
    options = parse_options(BuildConfig, {}, description=__doc__)
    device = start_processes(options.device or None).device
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    write_prompts(out)
    for name in options.stages:
        begin = time.perf_counter()
        STAGES[name](out, device, options.seed)
        print(f"stage  {name}: {(time.perf_counter() - begin) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    run_script(main)
