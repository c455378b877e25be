"""What differs between array frameworks: allocating beside an array, its current stream, types numpy lacks, DLPack on a stream."""
import contextlib
import importlib

DLPACK_CPU = (1, 3)  # kDLCPU, kDLCUDAHost
DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
LEGACY_DEFAULT_STREAM = 1  # DLPack's number of CUDA stream 0


def value_error(argument, expected, found):
    return ValueError(f"{argument}: expected {expected}, found {found}")


def shape(name, array, dims):
    """The array's shape, which must have `dims` dimensions."""
    found = getattr(array, "shape", None)
    if found is None or not hasattr(array, "__dlpack__"):
        raise value_error(name, "an array that exports DLPack", type(array).__name__)
    found = tuple(int(size) for size in found)
    if len(found) != dims:
        raise value_error(name, f"{dims} dimensions", f"shape {found}")
    return found


def choice(name, value, choices):
    if value not in choices:
        raise value_error(name, " or ".join(repr(c) for c in choices), repr(value))
    return value


class Caller:
    """The framework, device and stream of a call, taken from its first array."""

    def __init__(self, name, array, stream):
        if not hasattr(array, "__dlpack_device__"):
            raise value_error(name, "an array that exports DLPack", type(array).__name__)
        device_type, self.ordinal = (int(part) for part in array.__dlpack_device__())
        if device_type not in DLPACK_CPU + DLPACK_CUDA:
            raise value_error(name, "an array on a CPU or CUDA device", f"DLPack device type {device_type}")
        self.cuda = device_type in DLPACK_CUDA
        self.name = name
        self.array = array
        self.framework = framework_of(array)
        if not self.cuda and stream is not None:
            raise value_error("stream", f"None, as {name} is on the CPU", repr(stream))
        self.given_stream = stream
        self.stream = self._current_stream() if stream is None else int(stream)

    def _current_stream(self):
        if self.cuda and self.framework == "torch":
            return importlib.import_module("torch").cuda.current_stream(self.ordinal).cuda_stream
        if self.cuda and self.framework == "cupy":
            cupy = importlib.import_module("cupy")
            with cupy.cuda.Device(self.ordinal):
                return cupy.cuda.get_current_stream().ptr
        return 0

    def _on_stream(self, module):
        """Allocations and fills belong to the op's stream, or the allocator could hand the memory out too early."""
        if self.given_stream is None:
            return contextlib.nullcontext()
        if self.framework == "torch":
            return module.cuda.stream(module.cuda.ExternalStream(self.stream, device=self.array.device))
        return module.cuda.ExternalStream(self.stream, self.ordinal)

    def full(self, argument, dims, dtype, value=None):
        """A new array; dtype is uint8, float32 or bfloat16, uninitialised without a value."""
        if self.framework == "numpy":
            import numpy

            dtype = {"bfloat16": "uint16"}.get(dtype, dtype)
            return numpy.empty(dims, dtype) if value is None else numpy.full(dims, value, dtype)
        if self.framework == "torch":
            torch = importlib.import_module("torch")
            options = dict(dtype=getattr(torch, dtype), device=self.array.device)
            with self._on_stream(torch) if self.cuda else contextlib.nullcontext():
                return torch.empty(dims, **options) if value is None else torch.full(dims, value, **options)
        if self.framework == "cupy":
            cupy = importlib.import_module("cupy")
            dtype = {"bfloat16": "uint16"}.get(dtype, dtype)
            with cupy.cuda.Device(self.ordinal), self._on_stream(cupy):
                return cupy.empty(dims, dtype) if value is None else cupy.full(dims, value, dtype)
        found = "None" if value is None else repr(value)
        raise value_error(argument, f"an array (dsv4 allocates for numpy, torch and cupy; {self.name} is of {self.framework})", found)

    def take(self, name, array):
        """The array as the extension takes it: None, or something that exports DLPack on the op's stream."""
        if array is None:
            return None
        array = _as_bits(array)
        if not hasattr(array, "__dlpack_device__"):
            raise value_error(name, "an array that exports DLPack", type(array).__name__)
        if int(array.__dlpack_device__()[0]) not in DLPACK_CUDA:
            return array
        return array.__dlpack__(stream=self.stream or LEGACY_DEFAULT_STREAM)

    def take_written(self, name, array):
        _check_written(name, array)
        return self.take(name, array)


def _check_written(name, array):
    """JAX arrays are immutable, yet their DLPack capsules do not say so."""
    if array is not None and framework_of(array) in ("jax", "jaxlib"):
        raise value_error(name, "an array that may be written", "a JAX array, which is immutable")


def framework_of(array):
    """ "numpy", "torch" or "cupy", subclasses included; else the module of the array's type."""
    modules = [kind.__module__.partition(".")[0] for kind in type(array).__mro__]
    return next((module for module in modules if module in ("numpy", "torch", "cupy")), modules[0])


# Types that numpy has only through ml_dtypes, and torch exports to nobody: seen as the bytes they are.
_BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e8m0fnu": "uint8", "float4_e2m1fn_x2": "uint8"}


def _as_bits(array):
    dtype = str(getattr(array, "dtype", "")).rpartition(".")[2]
    framework = framework_of(array)
    if framework == "torch" and array.requires_grad:
        array = array.detach()
    if framework in ("numpy", "cupy") and dtype in _BITS:
        return array.view(_BITS[dtype])
    if framework == "torch" and dtype != "bfloat16" and dtype in _BITS:
        return array.view(importlib.import_module("torch").uint8)
    return array
