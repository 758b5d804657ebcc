"""Images from folders: decoding, labels, the order of training, and the data sets that can be fetched."""

from iddpm.data.arrays import open_npz, read_npz
from iddpm.data.decode import EXTENSIONS, decode, prepare
from iddpm.data.fetch import DATASETS, cifar10, digits, emoji
from iddpm.data.images import Images
from iddpm.data.order import Order
from iddpm.data.own import Dataset, Own

DataSet = Images | Own  # what batches are made of

__all__ = [
    "DATASETS",
    "EXTENSIONS",
    "DataSet",
    "Dataset",
    "Images",
    "Order",
    "Own",
    "cifar10",
    "decode",
    "digits",
    "emoji",
    "open_npz",
    "prepare",
    "read_npz",
]
