"""Images from folders: decoding, labels, the order of training, and the data sets that can be fetched."""

from iddpm.data.arrays import open_npz, read_npz
from iddpm.data.decode import EXTENSIONS, decode, prepare
from iddpm.data.fetch import DATASETS, cifar10, digits
from iddpm.data.images import Images
from iddpm.data.order import Order

__all__ = ["DATASETS", "EXTENSIONS", "Images", "Order", "cifar10", "decode", "digits", "open_npz", "prepare", "read_npz"]
