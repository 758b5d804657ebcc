"""The published checkpoints of improved- and guided-diffusion: their flags, and the numbers they should give.

The numbers are the authors' (Nichol & Dhariwal 2021, tables 1, 2 and 4; Dhariwal & Nichol 2021, table 5 and their code's notes).
"""

from typing import Any, NamedTuple

from iddpm.config import Config
from iddpm.interop.openai.formats.flags import to_config


class Published(NamedTuple):
    """One file."""

    program: str  # improved or guided
    task: str
    number: str  # what it should give
    flags: dict[str, Any]
    steps: int = 0  # of training, where the name or the paper says

    def config(self) -> Config:
        """The config of its network and process; sampled from with every step, as the original's commands do unless told."""
        return to_config(self.task, self.flags, self.program)


UNKNOWN = "no published number is known to us"
_COSINE = dict(diffusion_steps=4000, noise_schedule="cosine")
_VLB = dict(use_kl=True)
_PLAIN = dict(rescale_learned_sigmas=False, rescale_timesteps=False)
_64 = dict(image_size=64, num_channels=128, num_res_blocks=3, learn_sigma=True)
_32 = dict(_64, image_size=32, dropout=0.3)
_LSUN = dict(
    image_size=256, num_channels=128, num_res_blocks=2, num_heads=1, learn_sigma=True, use_scale_shift_norm=False,
    attention_resolutions="16", diffusion_steps=1000, noise_schedule="linear",
)  # fmt: skip
_GUIDED = dict(
    attention_resolutions="32,16,8", class_cond=True, diffusion_steps=1000, learn_sigma=True, noise_schedule="linear",
    num_res_blocks=2, resblock_updown=True, use_scale_shift_norm=True,
)  # fmt: skip
_G256 = dict(_GUIDED, image_size=256, num_channels=256, num_head_channels=64)
_GLSUN = dict(_G256, class_cond=False, dropout=0.1)
_UP = dict(_GUIDED, num_channels=192)
_BEDROOM = "LSUN bedroom: FID 4.24, sFID 8.21 (one of the two files; which is not said)"

PUBLISHED: dict[str, Published] = {
    # improved-diffusion, march 2021
    "imagenet64_uncond_100M_1500K": Published(
        "improved", "images", "ImageNet-64: 3.57 bits/dim; FID 19.2 of 10,000 samples", _64 | _COSINE, 1_500_000),
    "cifar10_uncond_50M_500K": Published(
        "improved", "images", "CIFAR-10: 3.17 bits/dim; FID 3.19 of 50,000 samples", _32 | _COSINE, 500_000),
    "imagenet64_cond_270M_250K": Published(
        "improved", "images", "ImageNet-64, 250 steps: FID 2.92, precision 0.82, recall 0.71",
        _64 | _COSINE | _PLAIN | dict(num_channels=192, class_cond=True), 250_000),
    "upsample_cond_500K": Published(
        "improved", "enlarge", UNKNOWN, _PLAIN | dict(
            num_channels=192, num_res_blocks=2, learn_sigma=True, class_cond=True, large_size=256, small_size=64,
            diffusion_steps=4000, noise_schedule="linear"), 500_000),
    "lsun_uncond_100M_1200K_bs128": Published("improved", "images", _BEDROOM, _LSUN | _PLAIN, 1_200_000),
    "lsun_uncond_100M_2400K_bs64": Published("improved", "images", _BEDROOM, _LSUN | _PLAIN, 2_400_000),
    "imagenet64_uncond_vlb_100M_1500K": Published(
        "improved", "images", "ImageNet-64: 3.53 bits/dim; FID 40.1 of 10,000 samples", _64 | _COSINE | _VLB, 1_500_000),
    "cifar10_uncond_vlb_50M_500K": Published(
        "improved", "images", "CIFAR-10: 2.94 bits/dim; FID 11.47 of 50,000 samples", _32 | _COSINE | _VLB, 500_000),
    # guided-diffusion, july 2021
    "64x64_diffusion": Published(
        "guided", "images", "ImageNet-64, 250 steps, no guidance: FID 2.07, precision 0.74, recall 0.63", _GUIDED | dict(
            image_size=64, num_channels=192, num_head_channels=64, num_res_blocks=3, dropout=0.1, noise_schedule="cosine",
            use_new_attention_order=True)),
    "128x128_diffusion": Published(
        "guided", "images", "ImageNet-128, 250 steps, guided at scale 0.5: FID 2.97, precision 0.78, recall 0.59",
        dict(_GUIDED, image_size=128, num_channels=256, num_heads=4)),
    "256x256_diffusion": Published(
        "guided", "images", "ImageNet-256, 250 steps, guided at scale 1: FID 4.59, precision 0.82, recall 0.52", _G256),
    "256x256_diffusion_uncond": Published("guided", "images", UNKNOWN, dict(_G256, class_cond=False)),
    "512x512_diffusion": Published(
        "guided", "images", "ImageNet-512, 250 steps, guided at scale 4: FID 7.72, precision 0.87, recall 0.42",
        dict(_G256, image_size=512)),
    "lsun_bedroom": Published("guided", "images", "LSUN bedroom, 1000 steps: FID 1.90, precision 0.66, recall 0.51", _GLSUN),
    "lsun_cat": Published("guided", "images", "LSUN cat, 1000 steps: FID 5.57, precision 0.63, recall 0.52", _GLSUN),
    "lsun_horse": Published("guided", "images", "LSUN horse, 1000 steps: FID 2.57, precision 0.71, recall 0.55", _GLSUN),
    "lsun_horse_nodropout": Published("guided", "images", UNKNOWN, dict(_GLSUN, dropout=0.0)),
    "64_256_upsampler": Published(
        "guided", "enlarge", "ImageNet-256, after a guided base model: FID 3.94, precision 0.83, recall 0.53",
        dict(_UP, large_size=256, small_size=64, num_heads=4)),
    "128_512_upsampler": Published(
        "guided", "enlarge", "ImageNet-512, after a guided base model: FID 3.85, precision 0.84, recall 0.53",
        dict(_UP, large_size=512, small_size=128, num_head_channels=64, attention_resolutions="32,16")),
    "64x64_classifier": Published(
        "guided", "classify", UNKNOWN, dict(image_size=64, classifier_depth=4, noise_schedule="cosine")),
    "128x128_classifier": Published("guided", "classify", UNKNOWN, dict(image_size=128)),
    "256x256_classifier": Published("guided", "classify", UNKNOWN, dict(image_size=256)),
    "512x512_classifier": Published("guided", "classify", UNKNOWN, dict(image_size=512)),
}  # fmt: skip
