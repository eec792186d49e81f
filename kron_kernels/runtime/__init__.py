"""Run a compressed model: from its folder, as a program of torch.export, or as an ONNX file.

Loading a package needs torch alone, or onnxruntime for ONNX; exporting and loading a folder need transformers too.
"""

from .export import ExportReport, export_model
from .package import Package, PackageInfo, load_package

__all__ = ["ExportReport", "Package", "PackageInfo", "export_model", "load_package"]
