"""Networks whose features images are compared by."""

from iddpm.extractors.interface import Extractor as Extractor
