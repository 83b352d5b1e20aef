"""What compiled loops do at an address, in LLVM's terms: pointers, numbers that threads share, and caches.

See `loops` on what numba keeps on disk.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from moe_triton.backends.torch.vectors import ask_for, call


@intrinsic
def next_of(typing_context, address):
    """The number at an address, which becomes larger by 1 in one step for all threads that see it."""

    def lower(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.IntType(64)(1), "seq_cst")

    return types.int64(types.intp), lower


@intrinsic
def value_of(typing_context, address):
    """The number at an address as other threads have left it."""

    def lower(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8, typ=ir.IntType(64))

    return types.int64(types.intp), lower


@intrinsic
def pause(typing_context):
    """Let a thread on the same core go first, in a loop that waits."""

    def lower(context, builder, signature, arguments):
        call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.none(), lower


@intrinsic
def finish_streams(typing_context):
    """Wait until what this thread wrote past the caches (`vectors.stream`) is where other threads find it."""

    def lower(context, builder, signature, arguments):
        call(builder, "llvm.x86.sse.sfence", ir.VoidType())
        return context.get_dummy_value()

    return types.none(), lower


@intrinsic
def call_at(typing_context, function, argument):
    """Call the compiled function at an address, which takes another address and returns nothing."""

    def lower(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [arguments[1].type])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
        return context.get_dummy_value()

    return types.none(types.intp, types.intp), lower


@intrinsic
def prefetch(typing_context, address):
    """Ask for the cache line at an address, which may be any."""

    def lower(context, builder, signature, arguments):
        ask_for(builder, arguments[0])
        return context.get_dummy_value()

    return types.none(types.intp), lower


def pointer_to(number):
    """Return a function that makes an address a pointer to numbers of a numba type."""

    @intrinsic
    def pointer(typing_context, address):
        def lower(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(number)(types.intp), lower

    return pointer
