"""A stand-in for CuPy on machines without a GPU: NumPy behind arrays that are as strict as CuPy's.

A CuPy array does not mix with a NumPy array and is not converted to one unless asked
(`.get()`); NumPy's functions refuse it. Code that passes device data to `numpy` by mistake
works on the CPU and fails on the GPU. With this library in the place of `xp` it fails on any
machine. What the arrays compute is NumPy's result, bit for bit.
"""
import numpy


def refuse(value, where):
    if isinstance(value, (numpy.ndarray, numpy.generic)) and getattr(value, "ndim", 0) > 0:
        raise TypeError(f"stand-in array library: {where} got a NumPy array; CuPy would refuse it")


def unwrap(value, where):
    """The NumPy value of an argument; a NumPy array among the arguments is refused."""
    refuse(value, where)
    if isinstance(value, Array):
        return value._values
    if isinstance(value, (list, tuple)):
        return type(value)(unwrap(part, where) for part in value)
    return value


def wrap(value):
    """Arrays and NumPy scalars come out as stand-in arrays (a reduction gives a 0-d array, as
    in CuPy)."""
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        return Array(numpy.asarray(value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(wrap, value))
    return value


class Array:
    """An array of the pretended device."""

    __array_ufunc__ = None

    def __init__(self, values):
        self._values = values

    def __array__(self, *_, **__):
        raise TypeError("implicit conversion of a device array to NumPy; use .get()")

    def get(self):
        return self._values.copy()

    shape = property(lambda self: self._values.shape)
    ndim = property(lambda self: self._values.ndim)
    size = property(lambda self: self._values.size)
    dtype = property(lambda self: self._values.dtype)
    T = property(lambda self: Array(self._values.T))
    strides = property(lambda self: self._values.strides)
    base = property(lambda self: self._values.base)

    def __len__(self):
        return len(self._values)

    def __iter__(self):
        return map(wrap, self._values)

    def __repr__(self):
        return f"standin.{self._values!r}"

    def __bool__(self):
        return bool(self._values)

    def __int__(self):
        return int(self._values)

    def __float__(self):
        return float(self._values)

    def __getitem__(self, key):
        return wrap(self._values[unwrap(key, "indexing")])

    def __setitem__(self, key, value):
        self._values[unwrap(key, "indexing")] = unwrap(value, "assignment")


def _forward(name):
    def method(self, *arguments, **options):
        arguments = [unwrap(argument, name) for argument in arguments]
        if any(hasattr(argument, "_node") for argument in arguments):
            return NotImplemented                       # `array + Tensor` is the Tensor's business
        options = {key: unwrap(value, name) for key, value in options.items()}
        answer = getattr(self._values, name)(*arguments, **options)
        if name.startswith("__i") and name != "__invert__":
            if answer is not self._values:  # NumPy gives a scalar where a 0-d array was meant
                self._values[...] = answer
            return self
        return answer if name in ("item", "tolist") else wrap(answer)
    return method


for _name in ("add sub mul truediv pow mod matmul radd rsub rmul rtruediv rpow rmatmul iadd isub "
              "imul itruediv neg invert or and eq ne lt le gt ge").split():
    setattr(Array, f"__{_name}__", _forward(f"__{_name}__"))
for _name in ("sum mean max any all reshape squeeze transpose swapaxes astype copy argmax cumsum "
              "item tolist").split():
    setattr(Array, _name, _forward(_name))
Array.__hash__ = None


class Function:
    """A function of NumPy, applied to stand-in arrays."""

    def __init__(self, function, transfers=False):
        self.function, self.transfers = function, transfers

    def __call__(self, *arguments, **options):
        if self.transfers:              # asarray and array are how data gets onto the device
            arguments = [argument._values if isinstance(argument, Array) else argument
                         for argument in arguments]
        else:
            arguments = [unwrap(argument, self.function.__name__) for argument in arguments]
        out = options.get("out")
        options = {key: unwrap(value, self.function.__name__) for key, value in options.items()}
        answer = self.function(*arguments, **options)
        return out if out is not None else wrap(answer)

    def __getattr__(self, name):                        # numpy.add.at and the like
        return Function(getattr(self.function, name))


class Generator:
    """xp.random.default_rng: numbers made on the device."""

    def __init__(self, seed):
        self.generator = numpy.random.default_rng(seed)

    def random(self, shape, dtype):
        return wrap(self.generator.random(shape, dtype=dtype))


class _Random:
    default_rng = staticmethod(Generator)


class _Lib:
    class stride_tricks:
        as_strided = Function(numpy.lib.stride_tricks.as_strided)


class ElementwiseKernel:
    """A kernel whose C++ happens to be Python as well: assignments of arithmetic and `larger`."""

    def __init__(self, inputs, results, operation, name, preamble=""):
        self.types = dict(parameter.split()[::-1]
                          for parameter in (inputs + ", " + results).split(", "))
        self.inputs = len(inputs.split(","))
        self.results = [parameter.split()[1] for parameter in results.split(", ")]
        self.operation, self.name = operation, name

    def __call__(self, *operands):
        if len(operands) not in (self.inputs, len(self.types)):
            raise TypeError(f"{self.name}: {len(operands)} operands for {self.inputs} inputs")
        values = dict(zip(self.types, (unwrap(operand, self.name) for operand in operands)))
        arrays = {name: value for name, value in values.items() if isinstance(value, numpy.ndarray)}
        (dtype,) = {array.dtype for array in arrays.values()}
        if any(self.types[name] != "T" for name in arrays):
            raise TypeError(f"{self.name}: an array where a number is declared")
        shape = numpy.broadcast_shapes(*(array.shape for array in arrays.values()))
        results = {name: arrays.get(name, numpy.empty(shape, dtype)) for name in self.results}
        if any(array.shape != shape for array in results.values()):
            raise ValueError(f"{self.name}: a result does not have the shape {shape}")
        names = {"larger": numpy.maximum, "sqrt": numpy.sqrt, **values}
        inputs = list(values)[:self.inputs]
        for name in inputs:                             # CUDA has them const
            if name in arrays:
                # a view that cannot be written to
                names[name] = numpy.broadcast_to(arrays[name], arrays[name].shape)
        given = [names[name] for name in inputs]
        exec(self.operation, names)
        if any(names[name] is not value for name, value in zip(inputs, given)):
            raise TypeError(f"{self.name}: an input is changed")
        for name, array in results.items():
            array[...] = names[name]
        answers = [wrap(array) for array in results.values()]
        return answers[0] if len(answers) == 1 else tuple(answers)


class Library:
    """The module: what NumPy has, with stand-in arrays in and out."""

    ElementwiseKernel = ElementwiseKernel
    random = _Random()
    lib = _Lib()
    ndarray = Array

    def __getattr__(self, name):
        value = getattr(numpy, name)
        if isinstance(value, type) or not callable(value):
            return value                                # dtypes, constants, finfo
        return Function(value, transfers=name in ("asarray", "array"))
