"""Recipes, one row each. `iddpm train DATA --preset NAME`; any flag given beside it wins.

Of several, as `--preset cifar10-tiny,edm`, a later one wins: those of methods change the mathematics alone.
"""

from typing import Any

from iddpm.errors import UserError

_TINY = dict(num_channels=32, num_res_blocks=2, channel_mult="1,2,2,2", attention_resolutions="8")
_IDDPM = dict(num_channels=128, num_res_blocks=3, diffusion_steps=4000, learn_sigma=True, batch_size=128, lr=1e-4)
_V = dict(noise_schedule="cosine", parametrization="v", schedule_sampler="stratified", solver="ddim")
_METHOD = dict(noise_schedule="linear", diffusion_steps=1000, parametrization="eps", learn_sigma=False, objective="auto",
               weighting="uniform", schedule_sampler="uniform", solver="ancestral", sampling_steps="250", grid="respaced",
               snr_shift=1.0, zero_terminal_snr=False)  # fmt: skip

# name: (what it is for and the number it reproduces or got, its settings)
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "auto": ("chosen for the images, the device and the time (config/auto.py); of a run that says nothing of its recipe", {}),
    "none": ("no recipe: what the flags say, else their defaults, which are the original's", {}),
    "digits": (
        "handwritten digits, 8x8 grey, in 2 to 4 minutes on two CPU cores (make demo)",
        dict(image_size="8", image_channels=1, class_cond=True, num_channels=48, num_res_blocks=1, channel_mult="1,2",
             attention_resolutions="4", diffusion_steps=1000, noise_schedule="cosine", learn_sigma=True, batch_size=64,
             lr=1e-3, lr_warmup_steps=100, lr_anneal_steps=-1, adam_beta2=0.99, ema_rate="0.999",
             schedule_sampler="stratified", class_dropout=0.1, guidance=1.5, steps=600, save_interval=300,
             sample_interval=300, sampling_steps="50"),
    ),
    "digits-classifier": (
        "a classifier of noisy digits, to guide a model of them, in 1 minute on two CPU cores",
        dict(task="classify", image_size="8", image_channels=1, class_cond=True, num_channels=32, num_res_blocks=1,
             channel_mult="1,2", attention_resolutions="4", num_head_channels=32, diffusion_steps=1000,
             noise_schedule="cosine", batch_size=128, lr=1e-3, lr_warmup_steps=50, lr_anneal_steps=-1, weight_decay=0.05,
             ema_rate="0.99", schedule_sampler="stratified", steps=500, save_interval=500),
    ),
    "cifar10-up": (
        "CIFAR-10 from 16 to 32 pixels in 15 minutes on two CPU cores: PSNR 26.61 dB, bicubic 26.56",
        dict(_TINY, **_V, task="enlarge", image_size="32", small_size="16", diffusion_steps=1000, batch_size=32,
             lr=1e-3, lr_warmup_steps=200, lr_anneal_steps=-1, adam_beta2=0.99, ema_rate="0.999", random_flip=True,
             steps=1200, save_interval=400, sample_interval=400, sampling_steps="3", consistent=True),
    ),
    "cifar10-tiny": (
        "CIFAR-10 in 15 minutes on two CPU cores: coherent colour and texture",
        dict(_TINY, **_V, image_size="32", diffusion_steps=1000, batch_size=32, lr=1e-3, lr_warmup_steps=200,
             lr_anneal_steps=-1, adam_beta2=0.99, ema_rate="0.999", random_flip=True, steps=1500, save_interval=500,
             sample_interval=500, sampling_steps="50"),
    ),
    "cifar10": (
        "Nichol & Dhariwal 2021, table 2, L_hybrid: FID 3.19, 3.17 bits/dim after 500K steps (not run here)",
        dict(_IDDPM, image_size="32", noise_schedule="cosine", dropout=0.3, steps=500_000, sampling_steps="all"),
    ),
    "cifar10-vlb": (
        "Nichol & Dhariwal 2021, table 2, L_vlb: FID 11.47, 2.94 bits/dim after 500K steps (not run here)",
        dict(_IDDPM, image_size="32", noise_schedule="cosine", dropout=0.3, objective="vlb",
             schedule_sampler="loss-second-moment", steps=500_000, sampling_steps="all"),
    ),
    "imagenet64": (
        "Nichol & Dhariwal 2021, table 1, L_hybrid: 3.57 bits/dim, FID 19.2 (10K) after 1.5M steps (not run here)",
        dict(_IDDPM, image_size="64", noise_schedule="cosine", steps=1_500_000),
    ),
    # Methods, whatever the images and the network: _METHOD is changed as a whole, so that nothing of a recipe before is left.
    "ddpm": ("the method of Ho et al. 2020: linear betas, the noise, every step", dict(_METHOD, sampling_steps="all")),
    "iddpm": (
        "the method of Nichol & Dhariwal 2021: cosine betas, a learned variance, the hybrid loss",
        dict(_METHOD, noise_schedule="cosine", diffusion_steps=4000, learn_sigma=True),
    ),
    "iddpm-vlb": (
        "the same for likelihood: the bound as the loss, levels drawn by their losses",
        dict(_METHOD, noise_schedule="cosine", diffusion_steps=4000, learn_sigma=True, objective="vlb",
             schedule_sampler="loss-second-moment"),
    ),
    "v": (
        "the method of Salimans & Ho 2022 before they distil: the cosine schedule and v",
        dict(_METHOD, noise_schedule="cosine", parametrization="v", schedule_sampler="stratified", solver="ddim",
             sampling_steps="50"),
    ),
    "edm": (
        "the method of Karras et al. 2022: noise on the whole image, a preconditioned network, 18 steps of heun",
        dict(_METHOD, noise_schedule="ve", parametrization="edm", weighting="edm", schedule_sampler="lognormal", solver="heun",
             sampling_steps="18", grid="karras"),
    ),
    "flow": (
        "rectified flow as Esser et al. 2024 train it: straight lines, the middle levels more often",
        dict(_METHOD, noise_schedule="flow", parametrization="flow", schedule_sampler="logit-normal",
             logit_mean=0.0, logit_std=1.0, solver="dpmpp_2m", sampling_steps="25"),
    ),
    "jit": (
        "the method of Li & He 2025: the image predicted, with the loss of a flow, at noisy levels; made for --network dit",
        dict(_METHOD, noise_schedule="flow", parametrization="x0", weighting="flow", schedule_sampler="logit-normal",
             logit_mean=0.8, logit_std=0.8, solver="heun", sampling_steps="50"),
    ),
}  # fmt: skip


def recipes(preset: str) -> list[dict[str, Any]]:
    """The settings of a preset, or of several, comma-separated, in their order. UserError for an unknown name."""
    names = preset.split(",") if preset else []
    if unknown := [name for name in names if name not in PRESETS]:
        raise UserError(f"--preset {unknown[0]} is not one of: {', '.join(PRESETS)}")
    return [PRESETS[name][1] for name in names]
