"""Train the embedded laboratory from nothing: VAE, CLIP, UNet, PickScore and the step-aware preference model.

    python -m tiny.build                          # everything, into tiny/model (two to three hours on 2 slow cores, by its steps)
    python -m tiny.build --stages spm --out DIR   # one stage again, on what the folder already holds

Every stage is seeded, prints a quality gate when it is done (and stops if the gate is missed), and writes its part of
the checkpoint in the on-disk layout of an official one. Held-out captions (`world.split_captions`)
appear in no stage.
"""
import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddim  # noqa: E402
from clip_spm import CLIP, CLIPConfig, preference_loss, preprocess_decoded  # noqa: E402
from diffusion import encode_empty, generate  # noqa: E402
from loading import load_clip, load_pipeline  # noqa: E402
from pairs import Pairs  # noqa: E402
from spm_train import PRESETS, SPMConfig, accuracy_table  # noqa: E402
from tiny import world  # noqa: E402
from training import start_processes  # noqa: E402
from unet import UNet, UNetConfig  # noqa: E402
from vae import VAE, VAEConfig  # noqa: E402

VAE_CONFIG = dict(
    _class_name="AutoencoderKL", in_channels=3, out_channels=3, latent_channels=4, sample_size=world.SIZE,
    block_out_channels=[16, 32, 32, 64], layers_per_block=1, norm_num_groups=8, act_fn="silu",
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=1.0)

UNET_CONFIG = dict(
    _class_name="UNet2DConditionModel", sample_size=world.SIZE // 8, in_channels=4, out_channels=4, layers_per_block=1,
    block_out_channels=[64, 96], down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2,
    cross_attention_dim=96, attention_head_dim=4, norm_num_groups=16, norm_eps=1e-5, act_fn="silu", flip_sin_to_cos=True,
    freq_shift=0, downsample_padding=1, mid_block_scale_factor=1, center_input_sample=False)
SCHEDULER_CONFIG = dict(
    _class_name="DDIMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
    set_alpha_to_one=False, clip_sample=False, steps_offset=1, prediction_type="epsilon", timestep_spacing="leading")
MODEL_INDEX = dict(
    _class_name="StableDiffusionPipeline", feature_extractor=[None, None], safety_checker=[None, None],
    image_encoder=[None, None], requires_safety_checker=False, scheduler=["diffusers", "DDIMScheduler"],
    text_encoder=["transformers", "CLIPTextModel"], tokenizer=["transformers", "CLIPTokenizer"],
    unet=["diffusers", "UNet2DConditionModel"], vae=["diffusers", "AutoencoderKL"])
TEXT_CONFIG = dict(
    architectures=["CLIPTextModel"], model_type="clip_text_model", hidden_size=96, intermediate_size=384, projection_dim=64,
    num_hidden_layers=2, num_attention_heads=4, hidden_act="quick_gelu", layer_norm_eps=1e-5, max_position_embeddings=16)
VISION_CONFIG = dict(
    model_type="clip_vision_model", hidden_size=128, intermediate_size=512, projection_dim=64, num_hidden_layers=3,
    num_attention_heads=4, hidden_act="quick_gelu", layer_norm_eps=1e-5, image_size=world.SIZE, patch_size=8)


def write_json(path: Path, value: dict) -> None:
    """Write a configuration file, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def pictures(count: int, seed: int, shares: tuple[float, ...] = (0.2, 0.2, 0.6)) -> tuple[torch.Tensor, list[world.Caption]]:
    """`count` training pictures as uint8 [N, 3, S, S] with their captions; `shares` of singles, counts and relations."""
    generator = torch.Generator().manual_seed(seed)
    train, _ = world.split_captions()
    kinds = [[c for c in train if c.kind == kind] for kind in ("single", "count", "relation")]
    share = torch.tensor(shares).multinomial(count, replacement=True, generator=generator).tolist()
    draw = torch.rand(count, generator=generator).tolist()
    captions = [kinds[k][int(u * len(kinds[k]))] for k, u in zip(share, draw)]
    images = [(world.render(captions[i:i + 256], generator) * 255).round().byte() for i in range(0, count, 256)]
    return torch.cat(images), captions


def to_model(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures -> [-1, 1] as the VAE wants them."""
    return images.float() / 127.5 - 1


def bf16(device: torch.device) -> torch.autocast:
    """Half precision on a GPU; on a CPU that lacks it a step takes ten times as long."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def schedule_lr(optimizer: torch.optim.Optimizer, step: int, steps: int, peak: float, warmup: int = 100) -> None:
    """Linear warm-up, then half a cosine down to 2 % of the peak."""
    if step < warmup:
        lr = peak * (step + 1) / warmup
    else:
        lr = peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))))
    for group in optimizer.param_groups:
        group["lr"] = lr


def gate(name: str, value: float, least: float) -> None:
    """Print a stage's quality and stop the build if it is not reached."""
    print(f"gate  {name}: {value:.4f} (at least {least})", flush=True)
    if value < least:
        raise SystemExit(f"tiny.build: {name} is {value:.4f}, below {least}; later stages would rest on it. Stopped.")


def build_vae(out: Path, device: torch.device, seed: int, steps: int = 2800, batch: int = 32) -> None:
    """Autoencoder: L1 + L1 of the pixel gradients (crisp edges) + a light KL towards N(0, 1)."""
    torch.manual_seed(seed)
    images, _ = pictures(16_000, seed + 1)
    vae = VAE(VAEConfig.from_json(VAE_CONFIG)).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    progress = tqdm(range(steps), desc="vae", mininterval=5)
    for step in progress:
        schedule_lr(optimizer, step, steps, peak=2e-3)
        x = to_model(images[torch.randint(len(images), (batch,))]).to(device)
        with bf16(device):
            mean, std = vae.moments(x)
            mean, std = mean.float(), std.float()
            y = vae.decode(mean + std * torch.randn_like(std)).float()
        difference = y - x
        edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        loss = difference.abs().mean() + 0.5 * edges + 1e-3 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            progress.set_postfix(l1=f"{difference.abs().mean():.4f}", kl=f"{kl:.2f}", refresh=False)
    vae.eval()
    with torch.no_grad():
        sample = torch.cat([vae.moments(to_model(images[i:i + 256]).to(device))[0] for i in range(0, 4096, 256)])
    config = dict(VAE_CONFIG, scaling_factor=round(float(1 / sample.std()), 5))
    write_json(out / "vae/config.json", config)
    save_file({k: v.cpu().contiguous() for k, v in vae.state_dict().items()},
              out / "vae/diffusion_pytorch_model.safetensors")
    check_vae(out, device, seed)


def load_vae(out: Path, device: torch.device) -> VAE:
    """The autoencoder of an earlier stage, in evaluation mode."""
    vae = VAE(VAEConfig.from_json(json.loads((out / "vae/config.json").read_text()))).to(device).eval()
    vae.load_state_dict(load_file(out / "vae/diffusion_pytorch_model.safetensors"))
    return vae


@torch.no_grad()
def check_vae(out: Path, device: torch.device, seed: int) -> None:
    """Gate: truth must survive the autoencoder. Also the ceiling: the best pictures as the VAE can show them."""
    vae, generator = load_vae(out, device), torch.Generator().manual_seed(seed + 2)
    _, captions = pictures(512, seed + 3)
    ones = torch.ones(len(captions))
    for name, images in (("real", world.render(captions, generator)), ("best", world.render(captions, generator, ones, ones))):
        again = vae.decode(vae.encode(images.to(device) * 2 - 1)).cpu() / 2 + 0.5
        aligned, beauty = world.alignment(again, captions).mean(), world.aesthetics(again)
        match = torch.corrcoef(torch.stack([beauty, world.aesthetics(images)]))[0, 1]
        print(f"vae   {name}: alignment {world.alignment(images, captions).mean():.3f} -> {aligned:.3f}, aesthetics "
              f"{world.aesthetics(images).mean():.2f} -> {beauty.mean():.2f}, L1 {(again - images).abs().mean():.4f}", flush=True)
        if name == "real":
            gate("VAE alignment of real pictures", float(aligned), 0.95)
            gate("VAE aesthetics correlation", float(match), 0.95)


def build_tokenizer(out: Path) -> None:
    """A CLIP byte-pair tokenizer whose merges are learnt from the captions, so that every word is one token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = {tuple(word[:-1]) + (word[-1] + "</w>",) for c in world.all_captions() for word in c.text.split()}
    merges = []
    while any(len(word) > 1 for word in words):
        pairs = [pair for word in sorted(words) for pair in zip(word, word[1:])]
        best = max(sorted(set(pairs)), key=pairs.count)
        merges.append(best)
        merged = set()
        for word in words:
            parts, i = [], 0
            while i < len(word):
                joined = word[i:i + 2] == best
                parts.append(word[i] + word[i + 1] if joined else word[i])
                i += 1 + joined
            merged.add(tuple(parts))
        words = merged
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>")
    write_json(out / "tokenizer/vocab.json", {token: i for i, token in enumerate(tokens)})
    (out / "tokenizer/merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    write_json(out / "tokenizer/special_tokens_map.json", special)
    write_json(out / "tokenizer/tokenizer_config.json", dict(
        special, tokenizer_class="CLIPTokenizer", model_max_length=TEXT_CONFIG["max_position_embeddings"],
        add_prefix_space=False, do_lower_case=True, errors="replace"))


def tokenize(out: Path, texts: list[str]) -> torch.Tensor:
    """Token ids [N, L], padded, through the same tokenizer class as the official models."""
    from transformers import CLIPTokenizer
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    return torch.tensor(tokenizer(texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids)


def clip_json(out: Path) -> dict:
    """The tiny CLIP's config.json; the vocabulary size is the tokenizer's."""
    vocab = len(json.loads((out / "tokenizer/vocab.json").read_text()))
    text = dict(TEXT_CONFIG, vocab_size=vocab, bos_token_id=vocab - 2, eos_token_id=vocab - 1, pad_token_id=vocab - 1)
    return dict(architectures=["CLIPModel"], model_type="clip", projection_dim=64, text_config=text, vision_config=VISION_CONFIG)


def save_clip(clip: CLIP, folder: Path, config: dict) -> None:
    """Weights and configuration in transformers' layout."""
    write_json(folder / "config.json", config)
    save_file({k: v.detach().cpu().float().contiguous() for k, v in clip.state_dict().items()}, folder / "model.safetensors")


def build_clip(out: Path, device: torch.device, seed: int, steps: int = 1500, batch: int = 128) -> None:
    """Contrastive pre-training on pictures and captions; each picture also gets one hard wrong caption."""
    build_tokenizer(out)
    config = clip_json(out)
    torch.manual_seed(seed + 10)
    clip = CLIP(CLIPConfig.from_json(config)).to(device)
    for module in clip.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)
    images, captions = pictures(20_000, seed + 11)
    train, _ = world.split_captions()
    ids, index = tokenize(out, [c.text for c in train]).to(device), {c.text: i for i, c in enumerate(train)}
    target = torch.tensor([index[c.text] for c in captions])
    hard_generator = torch.Generator().manual_seed(seed + 12)
    hard = torch.tensor([[index[world.mistaken(c, train, hard_generator).text] for _ in range(16)] for c in train])
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    progress = tqdm(range(steps), desc="clip", mininterval=5)
    for step in progress:
        schedule_lr(optimizer, step, steps, peak=1.5e-3)
        pick = torch.randint(len(images) - 2000, (batch,))
        right = target[pick]
        wrong = hard[right, torch.randint(hard.shape[1], (batch,))]
        with bf16(device):
            eyes = clip.image_features(preprocess_decoded(to_model(images[pick]).to(device), world.SIZE))
            words = clip.text_features(ids[torch.cat([right, wrong])])
        logits = clip.logit_scale.exp() * eyes @ words.T                                    # [N, 2N]
        # Two pictures of one caption are no negatives of each other.
        same = (torch.cat([right, wrong])[None, :] == right[:, None]).to(device)
        same[torch.arange(batch), torch.arange(batch)] = False
        logits = logits.masked_fill(same, -1e4)
        labels = torch.arange(batch, device=device)
        loss = 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits[:, :batch].T, labels))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        clip.logit_scale.data.clamp_(0, math.log(100))
        if step % 100 == 0:
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
    clip.eval()
    save_clip(clip, out.parent / "work/clip", config)                       # PickScore starts from it; not shipped
    text = CLIP(CLIPConfig.from_json(config["text_config"]))
    text.load_state_dict({k: v for k, v in clip.state_dict().items() if k.startswith("text_model.")})
    save_clip(text, out / "text_encoder", config["text_config"])
    with torch.no_grad():                                                   # unseen pictures, right against hard wrong
        tail = torch.arange(len(images) - 2000, len(images))
        eyes = clip.image_features(preprocess_decoded(to_model(images[tail]).to(device), world.SIZE))
        right = clip.score(eyes, clip.text_features(ids[target[tail]]))
        wrong = clip.score(eyes, clip.text_features(ids[hard[target[tail], 0]]))
    gate("CLIP right against nearly right caption", float((right > wrong).float().mean()), 0.9)


def build_unet(out: Path, device: torch.device, seed: int) -> None:
    """The denoiser alone, on the frozen CLIP text encoder: it learns what things look like and how many there are."""
    write_json(out / "model_index.json", MODEL_INDEX)
    write_json(out / "scheduler/scheduler_config.json", SCHEDULER_CONFIG)
    write_json(out / "unet/config.json", UNET_CONFIG)
    torch.manual_seed(seed + 20)
    unet = UNet(UNetConfig.from_json(UNET_CONFIG)).to(device)
    for module in unet.modules():       # each branch starts as nothing, so that depth does not hurt
        if isinstance(module, type(unet.mid_block.resnets[0])):
            torch.nn.init.zeros_(module.conv2.weight)
    torch.nn.init.zeros_(unet.conv_out.weight)
    train_unet(out, unet, device, seed + 21, count=32_000, shares=(0.2, 0.2, 0.6), steps=4600, peak=1.5e-3)
    check_unet(out, device, least=0.4)


def build_joint(out: Path, device: torch.device, seed: int) -> None:
    """Denoiser and text encoder together, mostly on relations.

    CLIP's loss only ever looks at the end token, so which thing stands where is poorly written on the other tokens, and
    the stage before gets it right half of the time. The words learn it here.
    """
    torch.manual_seed(seed + 22)
    unet = UNet(UNetConfig.from_json(UNET_CONFIG)).to(device)
    unet.load_state_dict(load_file(out / "unet/diffusion_pytorch_model.safetensors"))
    train_unet(out, unet, device, seed + 23, count=24_000, shares=(0.08, 0.12, 0.8), steps=2400, peak=1e-3, train_text=True)
    check_unet(out, device, least=0.8)


def train_unet(out: Path, unet: UNet, device: torch.device, seed: int, count: int, shares: tuple[float, ...], steps: int, peak: float,
               train_text: bool = False, batch: int = 64) -> None:
    """Plain epsilon-prediction, 10 % of the captions dropped for guidance, weights averaged (EMA); written into `out`."""
    images, captions = pictures(count, seed, shares)
    vae = load_vae(out, device)
    with torch.no_grad():
        moments = [vae.moments(to_model(images[i:i + 256]).to(device)) for i in range(0, len(images), 256)]
    mean, std = (torch.cat(part) * vae.config.scaling_factor for part in zip(*moments))
    del images
    train, _ = world.split_captions()
    index = {c.text: i for i, c in enumerate(train)}
    target = torch.tensor([index[c.text] for c in captions], device=device)
    text_json = json.loads((out / "text_encoder/config.json").read_text())
    text = CLIP(CLIPConfig.from_json(text_json)).to(device).requires_grad_(train_text)
    text.load_state_dict(load_file(out / "text_encoder/model.safetensors"))
    ids = tokenize(out, [c.text for c in train] + [""]).to(device)             # the last row is the empty caption
    with torch.no_grad():
        embeds = text.text_model(ids)[1]
    schedule = ddim.Schedule.from_json(SCHEDULER_CONFIG)
    parameters = [*unet.parameters(), *(text.parameters() if train_text else ())]
    live = [*unet.state_dict().values(), *(text.state_dict().values() if train_text else ())]
    average = [v.detach().clone() for v in live]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    progress, running = tqdm(range(steps), desc="unet", mininterval=5), 0.0
    for step in progress:
        schedule_lr(optimizer, step, steps, peak=peak, warmup=200)
        pick = torch.randint(len(mean), (batch,), device=device)
        latents = mean[pick] + std[pick] * torch.randn_like(mean[pick])
        noise, timestep = torch.randn_like(latents), torch.randint(0, 1000, (batch,), device=device)
        words = torch.where(torch.rand(batch, device=device) < 0.1, len(train), target[pick])
        prompt_embeds = text.text_model(ids[words])[1] if train_text else embeds[words]
        with bf16(device):
            noise_pred = unet(ddim.add_noise(schedule, latents, noise, timestep), timestep, prompt_embeds)
        loss = (noise_pred.float() - noise).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.998 if train_text else 0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(average, live, 1 - decay)
        running = running * 0.99 + loss.detach() * 0.01 if step else loss.detach()
        if step % 100 == 0:
            progress.set_postfix(mse=f"{running:.4f}", refresh=False)
        if train_text and step % 800 == 799:
            save_average(out, unet, text, text_json, average)
            check_unet(out, device, least=0, scales=(3.0,))
    save_average(out, unet, text, text_json, average)


def save_average(out: Path, unet: UNet, text: CLIP, text_json: dict, average: list[torch.Tensor]) -> None:
    """Write the averaged weights: the UNet's, and the text encoder's if they were trained too."""
    names = list(unet.state_dict())
    save_file({k: v.cpu().contiguous() for k, v in zip(names, average)}, out / "unet/diffusion_pytorch_model.safetensors")
    if len(average) > len(names):
        copy = CLIP(text.config)
        copy.load_state_dict(dict(zip(text.state_dict(), average[len(names):])))
        save_clip(copy, out / "text_encoder", text_json)


def check_unet(out: Path, device: torch.device, least: float, scales: tuple[float, ...] = (2.0, 3.0, 5.0)) -> None:
    """Gate: the base model must draw most captions right; guidance is a matter of taste, so several are shown."""
    pipe, (_, held) = load_pipeline(str(out), device=device), world.split_captions()
    aligned = {}
    for scale in scales:
        images = generate(pipe, [c.text for c in held], list(range(len(held))), batch=64, guidance_scale=scale, eta=1.0)
        aligned[scale] = float(world.alignment(images, held).mean())
        print(f"unet  held-out captions, guidance {scale}: alignment {aligned[scale]:.3f}, "
              f"aesthetics {world.aesthetics(images).mean():.2f}", flush=True)
    gate("base alignment on held-out captions", max(aligned.values()), least)


def build_pickscore(out: Path, device: torch.device, seed: int, steps: int = 1300, batch: int = 64) -> None:
    """PickScore: CLIP fine-tuned on generic preferences between clean pictures. Too high a rate and it forgets captions."""
    clip = load_clip(str(out.parent / "work/clip"), device=device).requires_grad_(True)
    images, captions, labels = world.preference_pairs(20_000, seed + 31)
    ids = tokenize(out, captions).to(device)
    torch.manual_seed(seed + 30)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=2e-4, betas=(0.9, 0.98), weight_decay=0.05)
    train = len(images) - 1000

    def scores(pick: torch.Tensor) -> torch.Tensor:
        pixels = preprocess_decoded(to_model(images[pick].flatten(0, 1)).to(device), world.SIZE)
        return clip.score(clip.image_features(pixels), clip.text_features(ids[pick]).repeat_interleave(2, 0)).view(-1, 2)

    progress = tqdm(range(steps), desc="pickscore", mininterval=5)
    for step in progress:
        schedule_lr(optimizer, step, steps, peak=2e-4, warmup=30)
        pick = torch.randint(train, (batch,))
        both = scores(pick)
        loss = preference_loss(both[:, 0], both[:, 1], labels[pick].to(device)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
    with torch.no_grad():
        tail = torch.arange(train, len(images))
        both = torch.cat([scores(part) for part in tail.split(250)])
    save_clip(clip.eval(), out / "pickscore", clip_json(out))
    gate("PickScore accuracy on unseen pairs", float(((both[:, 0] > both[:, 1]).cpu() == (labels[tail] > 0.5)).float().mean()), 0.75)


def judge_table(folder: str, models: dict[str, CLIP], count: int, seed: int, device: str = "cpu") -> dict[str, dict]:
    """spm_train's accuracy table of the models on `count` pairs that no training has seen; `folder`: the checkpoint."""
    pipe, config = load_pipeline(folder, device=device), SPMConfig(**PRESETS["tiny"], seed=seed)
    images, captions, labels = world.preference_pairs(count, seed)
    pairs = Pairs(captions, labels, torch.ones(count), [range(count)], lambda i: images[i])
    ids = pipe.tokenizers[0](captions, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
    return accuracy_table(pipe, models, pairs, lambda index, _: labels[index].to(device), list(range(count)), config, encode_empty(pipe),
                          ids, start_processes(device))


def build_spm(out: Path, device: torch.device, seed: int) -> None:
    """The step-aware preference model and its step-blind twin, through `spm_train.py` as anybody would run it."""
    run = out.parent / "work/spm"
    shutil.rmtree(run, ignore_errors=True)
    subprocess.run([sys.executable, "spm_train.py", "--out", str(run), "--seed", str(seed), "--device", device.type], check=True,
                   cwd=Path(__file__).resolve().parent.parent)
    for name in ("spm", "spm_step_blind"):
        shutil.copytree(run / name, out / name, dirs_exist_ok=True)
    judges = {name: load_clip(str(out / folder), device=device) for name, folder in (("PickScore", "pickscore"), ("SPM", "spm"))}
    table = judge_table(str(out), judges, 2048, 30_000, str(device))        # experiments/judges.py reports on others
    for t, (_, _, _, difference, error) in table["SPM"].items():
        least = 2.0 if t in (251, 501) else -1.0            # clearly better there, nowhere worse
        gate(f"SPM minus PickScore at t = {t}, in paired standard errors", difference / max(error, 1e-6), least)


def pack(out: Path, device: torch.device, seed: int) -> None:
    """Store the UNet and the VAE in half precision, so that all of it stays below 25 MB; what they draw does not change."""
    for part in ("unet", "vae"):
        file = out / part / "diffusion_pytorch_model.safetensors"
        save_file({k: v.half() for k, v in load_file(file).items()}, file)
    check_vae(out, device, seed)
    check_unet(out, device, least=0.8, scales=(3.0,))


def write_prompts(out: Path) -> None:
    """The two prompt lists, so that every script reads them like anybody's."""
    train, held = world.split_captions()
    (out / "train_prompts.txt").write_text("".join(c.text + "\n" for c in train))
    (out / "held_out_prompts.txt").write_text("".join(c.text + "\n" for c in held))


STAGES = {"vae": build_vae, "clip": build_clip, "unet": build_unet, "joint": build_joint,
          "pickscore": build_pickscore, "spm": build_spm, "pack": pack}


def main() -> None:
    """Run the stages asked for, and say how long each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(Path(__file__).resolve().parent / "model"), help="folder of the checkpoint")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    out, times = Path(options.out).resolve(), {}
    out.mkdir(parents=True, exist_ok=True)
    write_prompts(out)
    for name in options.stages:
        begin = time.perf_counter()
        STAGES[name](out, torch.device(options.device), options.seed)
        times[name] = time.perf_counter() - begin
    print("stage      minutes")
    for name, seconds in times.items():
        print(f"{name:10} {seconds / 60:7.1f}")


if __name__ == "__main__":
    main()
