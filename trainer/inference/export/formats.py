"""The files that other programs run a model from: how each is written, and run here."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import sys
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from trainer.base.errors import UserError, did_you_mean
from trainer.base.signals import Stopped

INPUT, OUTPUT = "images", "logits"
# [B, C, H, W] float32, normalized, to float32 logits [B, K]; any B
Engine = Callable[[np.ndarray], np.ndarray]


class Format(ABC):
    """file: its name. runs_by: for people. packages: what writes and runs it; int8_packages: what
    quantizes it, None where nothing does. In use.py use_open opens the file at `path`, use_run
    gives the logits [K] of `pixels` [C, H, W], and use_needs is what both import.
    """

    name: ClassVar[str]
    file: ClassVar[str]
    runs_by: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    int8_packages: ClassVar[tuple[str, ...] | None] = None
    use_needs: ClassVar[str]
    use_open: ClassVar[str]
    use_run: ClassVar[str]

    @abstractmethod
    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        """Write a model in evaluation mode on the CPU. example: two images of an input."""

    def quantize(self, source: Path, target: Path, inputs: Sequence[np.ndarray]) -> None:
        """Write an int8 model of a written file, where there are int8_packages. inputs:
        [1, C, H, W] float32 each, on which the ranges of its values are found.
        """
        raise NotImplementedError(self.name)

    @abstractmethod
    def engine(self, path: Path, num_threads: int | None = None) -> Engine:
        """What runs a written file on the CPU. num_threads: None for all cores."""

    def check_installed(self, int8: bool = False) -> None:
        """Raises UserError for a package that is missing, and for a format without int8."""
        if int8 and self.int8_packages is None:
            raise UserError(f"int8=1: {self.name} has no int8", "use to=onnx or to=openvino")
        needed = self.packages + (self.int8_packages or () if int8 else ())
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(
                f"to={self.name}: {missing[0]} is not installed",
                f"pip install {' '.join(needed)} (the extra `export`)",
            )


class Onnx(Format):
    """Source: https://onnx.ai, torch.onnx.export of torch.export's graph."""

    name, file, runs_by = "onnx", "model.onnx", "onnxruntime"
    packages = ("onnx", "onnxscript", "onnxruntime")
    int8_packages = ()
    use_needs = "onnxruntime"
    use_open = "session = onnxruntime.InferenceSession(path)"
    use_run = f'session.run(None, {{"{INPUT}": pixels[None]}})[0][0]'

    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        program = torch.onnx.export(
            model,
            (example,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
        assert program is not None, "dynamo=True"
        program.save(path)  # weights of more than 1.5 GiB go into a file of their own beside it

    def quantize(self, source: Path, target: Path, inputs: Sequence[np.ndarray]) -> None:
        from onnxruntime import quantization  # an extra
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(quantization.CalibrationDataReader):
            left = iter(inputs)

            def get_next(self):
                images = next(self.left, None)
                return None if images is None else {INPUT: images}

        ready = source.with_name("ready.onnx")
        quant_pre_process(source, ready, skip_symbolic_shape=True)
        quantization.quantize_static(
            ready,
            target,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )

    def engine(self, path: Path, num_threads: int | None = None) -> Engine:
        import onnxruntime  # an extra

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or 0
        options.log_severity_level = 3  # what it warns of is how it stores a graph
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {INPUT: images})[0]


class OpenVino(Format):
    """OpenVINO's model.xml, with its weights beside it in model.bin; made from ONNX."""

    name, file, runs_by = "openvino", "model.xml", "OpenVINO"
    packages = ("onnx", "onnxscript", "openvino")
    int8_packages = ("nncf",)
    use_needs = "openvino"
    # a processor with bfloat16 would round to it
    use_open = 'model = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})'
    use_run = "model(pixels[None])[0][0]"

    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        openvino = opened_openvino()
        with tempfile.TemporaryDirectory() as folder:
            between = Path(folder) / Onnx.file
            Onnx().write(model, example, between)
            made = openvino.convert_model(between)
        openvino.save_model(made, path, compress_to_fp16=False)

    def quantize(self, source: Path, target: Path, inputs: Sequence[np.ndarray]) -> None:
        openvino = opened_openvino()
        with without_telemetry():
            import nncf  # an extra

        made = nncf.quantize(
            openvino.Core().read_model(source),
            nncf.Dataset(inputs),
            preset=nncf.QuantizationPreset.MIXED,  # activations may be asymmetric
            subset_size=len(inputs),
        )
        openvino.save_model(made, target, compress_to_fp16=False)

    def engine(self, path: Path, num_threads: int | None = None) -> Engine:
        openvino = opened_openvino()
        config: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": "f32"}
        if num_threads is not None:
            config["INFERENCE_NUM_THREADS"] = num_threads
        model = openvino.compile_model(path, "CPU", config)
        return lambda images: model(images)[0]


class TorchExport(Format):
    """The graph of torch.export, for torch itself and for its compilers."""

    name, file, runs_by = "torch_export", "model.pt2", "torch"
    use_needs = "torch"
    use_open = "model = torch.export.load(path).module()"
    use_run = "model(torch.from_numpy(pixels[None]))[0].detach().numpy()"

    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        torch.export.save(_graph_of(model, example), path)

    def engine(self, path: Path, num_threads: int | None = None) -> Engine:
        return _of_torch(torch.export.load(path).module())


class TorchScript(Format):
    """A traced TorchScript module, which libtorch runs too; of torch.export's graph, in which no
    operation is Python's.
    """

    name, file, runs_by = "torchscript", "model.pt", "torch"
    use_needs = "torch"
    use_open = "model = torch.jit.load(path)"
    use_run = "model(torch.from_numpy(pixels[None]))[0].detach().numpy()"

    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        graph = _graph_of(model, example).module()
        with torch.no_grad():
            traced = torch.jit.trace(graph, example, check_trace=False)  # checked on images
        torch.jit.save(traced, path)

    def engine(self, path: Path, num_threads: int | None = None) -> Engine:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch.jit's end
            return _of_torch(torch.jit.load(path))


def _graph_of(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """For any number of images."""
    batch = {0: torch.export.Dim("batch")}
    return torch.export.export(model, (example,), dynamic_shapes=(batch,))


def _of_torch(model: Callable[[Tensor], Tensor]) -> Engine:
    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(images)).numpy()

    return run


FORMATS: dict[str, Format] = {
    one.name: one for one in (Onnx(), OpenVino(), TorchExport(), TorchScript())
}


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """A block in which OpenVINO's packages are imported as if the one that reports their use to
    Google Analytics, and is asked for by each of them, were not installed.
    """
    name = "openvino_telemetry"
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]  an import of it fails
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def opened_openvino():
    """The package, an extra."""
    with without_telemetry():
        import openvino

    return openvino


def format_of(name: str) -> Format:
    """Raises UserError for what is no format."""
    if name not in FORMATS:
        raise UserError(
            f"to={name}: unknown{did_you_mean(name, FORMATS)}", f"use {', '.join(FORMATS)}"
        )
    return FORMATS[name]


def write_model(form: Format, model: nn.Module, example: Tensor, path: Path) -> None:
    """Raises UserError for a model that the format's exporter cannot follow."""
    with _quietly(f"to={form.name}: this model cannot be exported"):
        form.write(model, example, path)


def quantize_model(form: Format, source: Path, target: Path, inputs: Sequence[np.ndarray]) -> None:
    """Raises UserError for a model that the format's quantizer cannot follow."""
    with _quietly(f"int8=1: this model cannot be quantized for {form.name}"):
        form.quantize(source, target, inputs)


@contextlib.contextmanager
def _quietly(failure: str) -> Iterator[None]:
    """A block whose warnings and bars are of others' code; what it raises over a model's operations
    becomes one line.
    """
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        except Stopped:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{failure} ({reason})", "use another format, or report it") from error
        finally:
            logging.disable(before)
