"""The state as numba sees it: one pointer to a table of the address and shape of every array.

A NamedTuple of 75 arrays is some 450 machine words, which numba passes one by one in each call that it does not inline;
that took most of the time of a run, and of its compilation. As a type of its own the state is one word. The table
does not change while code runs; loads from it are marked invariant: LLVM loads an address once, not after each store.
"""

from typing import Any

from llvmlite import ir
from numba import from_dtype, types
from numba.core.typing.templates import AttributeTemplate
from numba.extending import (
    NativeValue,
    infer_getattr,
    lower_getattr_generic,
    models,
    register_model,
    typeof_impl,
    unbox,
)
from numba.np.arrayobj import populate_array

from ares.simulator.state import NAMES, RECORDS, WORDS, State, allocate

_WORD = ir.IntType(64)


class StateType(types.Type):  # type: ignore[misc]
    """Numba's type of a State: attributes are C-contiguous arrays and records."""

    def __init__(self) -> None:
        super().__init__(name="ares.simulator.State")


_TYPE = StateType()
_SAMPLE = allocate(1, 1, 1, 1, 1)
_ARRAYS = {
    name: types.Array(types.float64 if array.dtype.kind == "f" else types.int64, array.ndim, "C")
    for name, array in _SAMPLE.arrays()
    if array.dtype.names is None
}
_RECORDS = {name: from_dtype(layout) for name, layout in RECORDS.items()}


@typeof_impl.register(State)  # type: ignore[untyped-decorator]
def _typeof(value: State, context: Any) -> StateType:
    return _TYPE


@register_model(StateType)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: StateType) -> None:
        super().__init__(manager, kind, _WORD.as_pointer())


@unbox(StateType)  # type: ignore[untyped-decorator]
def _unbox(kind: StateType, value: Any, context: Any) -> NativeValue:
    """Read the address of the table; the caller's State keeps the arrays alive."""
    boxed = context.pyapi.object_getattr_string(value, "address")
    address = context.pyapi.long_as_longlong(boxed)
    context.pyapi.decref(boxed)
    return NativeValue(context.builder.inttoptr(address, _WORD.as_pointer()))


@infer_getattr
class _Attributes(AttributeTemplate):  # type: ignore[misc]
    key = StateType

    def generic_resolve(self, kind: StateType, name: str) -> Any:
        return _ARRAYS.get(name) or _RECORDS.get(name)


@lower_getattr_generic(StateType)  # type: ignore[untyped-decorator]
def _attribute(context: Any, builder: Any, kind: StateType, table: Any, name: str) -> Any:
    """Make the array or record `name` from its row of the table: address, then lengths."""
    row = WORDS * NAMES.index(f"{name}_array" if name in _RECORDS else name)

    def word(column: int) -> Any:
        loaded = builder.load(builder.gep(table, [_WORD(row + column)]))
        loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
        return loaded

    if name in _RECORDS:
        return builder.inttoptr(word(0), context.get_value_type(_RECORDS[name]))
    array_type = _ARRAYS[name]
    array = context.make_array(array_type)(context, builder)
    shape = [word(1 + axis) for axis in range(array_type.ndim)]
    strides = [_WORD(8)] if len(shape) == 1 else [builder.mul(shape[1], _WORD(8)), _WORD(8)]
    data = builder.inttoptr(word(0), context.get_data_type(array_type.dtype).as_pointer())
    populate_array(array, data=data, shape=shape, strides=strides, itemsize=_WORD(8), meminfo=None)
    return array._getvalue()  # noqa: SLF001 - numba's own way to end a structure
