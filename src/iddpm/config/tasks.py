"""What a run is to learn: each task is a row, which the rest of the program asks instead of comparing names."""

from typing import NamedTuple


class Task(NamedTuple):
    """What a task is, does and needs."""

    help: str
    next: str  # what a user does with the trained run, with {run} and {data}
    draws: bool = False  # makes images from noise alone: can be measured against real ones
    enlarges: bool = False  # is given a small image, and makes a large one of it
    translates: bool = False  # is given another image, which lies under the same name, and makes its partner
    classifies: bool = False  # makes no images: tells the class of noisy ones, to guide another model
    inputs: tuple[str, ...] = ()  # the flags of `iddpm sample` that name the images it is given


TASKS = {
    "images": Task("a model of images", "iddpm sample {run}", draws=True),
    "enlarge": Task(
        "a model that enlarges images (super-resolution)",
        "iddpm sample {run} --high_res {data}, or iddpm sample BASE --then {run}",
        enlarges=True,
        inputs=("low_res", "high_res"),
    ),
    "translate": Task(
        "a model of an image given another one (a mask, a sketch)",
        "iddpm sample {run} --given IMAGES",
        translates=True,
        inputs=("given",),
    ),
    "classify": Task("a classifier of noisy images, to guide a model", "iddpm sample RUN --classifier {run}", classifies=True),
}

# What --network said of the task before the two were parted: in configs of version 1, and in users' fingers.
TASK_OF = {"super_res": "enlarge", "classifier": "classify"}
