"""Models as packages that run without transformers: an AOTInductor or exported program of torch, or an ONNX file.

Loading needs torch alone, or onnxruntime for ONNX; exporting needs transformers too.
"""

from .export import ExportReport, export_model
from .package import FORMATS, Package, PackageInfo, load_package

__all__ = ["FORMATS", "ExportReport", "Package", "PackageInfo", "export_model", "load_package"]
