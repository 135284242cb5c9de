"""Pipeline stages of a model that stays the user's object.

A rank keeps the layers of its stages; everywhere else stand a few lines that pass on what they are
given. So a stage is run by calling the model's own forward, with the batch that every rank has:
masks, positions and rotary tables are made where they are used, and between ranks nothing travels
but the hidden states.

    stage 1 of 3:   embeddings*   0* 1*   2 3   4* 5*   norm* head*        * stand-in
                                  |             |
                    gives what was received     takes what is to be sent

Where a rank has several stages, each has its own set of stand-ins, put in place while it runs.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from hf_speed.errors import ConfigError, EngineError
from hf_speed.pipe.body import Body, Place


class LayerKind:
    """What is known of all layers of a model.

    Attributes:
        returns_tuple: whether they return a tuple, whose first member is the hidden states. Learnt
            from a layer that runs here, or from the stage before; until then, what they declare.
    """

    def __init__(self, layer: nn.Module) -> None:
        said = inspect.signature(type(layer).forward).return_annotation
        text = said if isinstance(said, str) else getattr(said, "__name__", str(said))
        self.returns_tuple = "tuple" in str(text).lower()

    def look_at(self, module: nn.Module, args: object, output: object) -> None:  # noqa: ARG002
        """A forward hook of a layer."""
        self.returns_tuple = isinstance(output, tuple)


class Passage:
    """What passes through one run of a stage.

    Attributes:
        received: hidden states from the stage before; None on the first stage.
        result: hidden states for the next stage, once they have been met.
        in_layers: whether a layer, or its stand-in, has run.
    """

    def __init__(self) -> None:
        self.received: Tensor | None = None
        self.result: Tensor | None = None
        self.in_layers = False

    def begin(self, received: Tensor | None) -> None:
        """Start a run."""
        self.received, self.result, self.in_layers = received, None, False

    def finish(self) -> Tensor | None:
        """End a run and let go of its tensors; returns the result."""
        result = self.result
        self.received = self.result = None
        return result


class LayerElsewhere(nn.Module):
    """Stands for a layer of another stage: hands on the hidden states.

    Args:
        layer: that it stands for; its plain attributes can be read here too.
        index: of the layer.
        takes: it follows the stage's last layer: what it is given is the stage's result.
        gives: it is the first of all: it gives what was received.
        kind: of the layers.
        passage: of the stage.
    """

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        *,
        takes: bool,
        gives: bool,
        kind: LayerKind,
        passage: Passage,
    ) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            # Some models look at a layer's kind of attention before they call it.
            if isinstance(value, (str, int, float)) and not name.startswith("_"):
                self.__dict__.setdefault(name, value)
        self._index = index
        self._takes = takes
        self._gives = gives
        self._kind = kind
        self._passage = passage

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states; a key-value cache grows by empty keys, so that its length is true."""
        passage = self._passage
        passage.in_layers = True
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if self._takes:
            passage.result = hidden
        if self._gives and passage.received is not None:
            hidden = passage.received
        for value in (*args[1:], *kwargs.values()):
            if hasattr(value, "get_seq_length") and hasattr(value, "update"):
                empty = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
                value.update(empty, empty, self._index)
        return (hidden,) if self._kind.returns_tuple else hidden


class Entrance(nn.Module):
    """Stands before a stage's first layer, which is given what was received.

    What a model's forward does to hidden states between two layers the stage before has done; what
    it does here, to what stand-ins hand on, does not count.

    Args:
        layer: the first of a stage; its attributes can be read here too.
        passage: of the stage.
    """

    def __init__(self, layer: nn.Module, passage: Passage) -> None:
        super().__init__()
        # Not a submodule: it has its own place in the model.
        self.__dict__["_layer"] = layer
        self._passage = passage

    def __getattr__(self, name: str) -> Any:
        """What the layer has."""
        layer = self.__dict__.get("_layer")
        return super().__getattr__(name) if layer is None else getattr(layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own, of what was received."""
        received = self._passage.received
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = received
        else:
            args = (received, *args[1:])
        return self.__dict__["_layer"](*args, **kwargs)


class Elsewhere(nn.Module):
    """Stands for a module before or after the layers that is on another stage.

    Args:
        path: of the module, for messages.
        comes_first: it runs before the layers.
        passage: of the stage.
    """

    def __init__(self, path: str, *, comes_first: bool, passage: Passage) -> None:
        super().__init__()
        self._path = path
        self._comes_first = comes_first
        self._passage = passage

    def __getattr__(self, name: str) -> Any:
        """What the stand-in lacks is on another rank.

        Raises:
            AttributeError: says so.
        """
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(
                f"{self._path}.{name} is on another pipeline stage (mesh.pp > 1)."
            ) from error

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Something of the right shape; it is replaced by the first layer's stand-in."""
        passage = self._passage
        if self._comes_first == passage.in_layers:
            said, does = ("before", "after") if self._comes_first else ("after", "before")
            raise ConfigError(
                f"mesh.pp > 1 cannot cut this model: {self._path} is defined {said} the layers, "
                f"but runs {does} them. Set mesh.pp=1."
            )
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        if self._comes_first and passage.received is not None:
            floating = next((each for each in given if each.is_floating_point()), None)
            return passage.received.detach() if floating is None else floating
        return given[0]


class DropoutSomewhere(nn.Module):
    """Dropout around the layers: acts before them on the first stage, after them on the last.

    Elsewhere its numbers would be drawn for values that are thrown away.

    Args:
        module: the dropout.
        is_first: its stage is the first.
        is_last: its stage is the last.
        passage: of the stage.
    """

    def __init__(
        self, module: nn.Module, *, is_first: bool, is_last: bool, passage: Passage
    ) -> None:
        super().__init__()
        self._dropout = module
        self._is_first = is_first
        self._is_last = is_last
        self._passage = passage

    def forward(self, x: Tensor) -> Tensor:
        """The values as they are, or with dropout."""
        acts = self._is_last if self._passage.in_layers else self._is_first
        return self._dropout(x) if acts else x


class Swap(NamedTuple):
    """What stands at a place while a stage runs."""

    place: Place
    module: nn.Module


class Stage:
    """One stage that this rank has.

    Args:
        index: 0 to num_stages - 1.
        num_stages: of the pipeline.
        swaps: what stands where while it runs.
        modules: the model's own modules that are part of it.
        layer_ends: its first and its last layer.
        passage: of its runs.
    """

    def __init__(
        self,
        index: int,
        num_stages: int,
        *,
        swaps: Sequence[Swap],
        modules: Sequence[nn.Module],
        layer_ends: tuple[nn.Module, nn.Module],
        passage: Passage,
    ) -> None:
        self.index = index
        self.num_stages = num_stages
        self.swaps = tuple(swaps)
        self.modules = tuple(modules)
        self.layer_ends = layer_ends
        self.passage = passage
        self._caches: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def cache_for(self, cache: Any) -> Any:
        """This stage's own key-value cache beside the caller's, which another stage here fills.

        In one cache the layers of several stages would grow at different moments, and each stage
        would take the others' new length for the past's.
        """
        if cache not in self._caches:
            self._caches[cache] = copy.deepcopy(cache)
        return self._caches[cache]

    @property
    def is_first(self) -> bool:
        """Whether the batch's tokens enter here."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the loss comes from here."""
        return self.index == self.num_stages - 1

    @contextmanager
    def running(self, received: Tensor | None) -> Iterator[Passage]:
        """Its stand-ins are in place inside."""
        before = [(swap.place, swap.place.module) for swap in self.swaps]
        self.passage.begin(received)
        try:
            for place, module in self.swaps:
                place.parent._modules[place.key] = module
            yield self.passage
        finally:
            for place, module in before:
                place.parent._modules[place.key] = module


class StageRunner(nn.Module):
    """Calls the model's own forward as one of its stages.

    A module of its own, so that hooks on it see the run of a stage, and none see the user's call
    of the model, which runs a whole schedule. It holds no parameters.

    Args:
        model: the user's.
        first_index: of the first stage on this rank, which fills the caller's key-value cache.

    Attributes:
        output_kind: class of what the model returns, also where that is of no use; None before it
            has run.
    """

    output_kind: type | None
    _cache: Any
    _model: nn.Module
    _forward: Callable[..., Any]

    def __init__(self, model: nn.Module, first_index: int) -> None:
        super().__init__()
        self._first_index = first_index
        # Not a submodule: the model's parameters are the model's.
        self.__dict__["_model"] = model
        self.__dict__["_forward"] = model.forward
        self.__dict__["output_kind"] = None
        self.__dict__["_cache"] = None

    def forward(self, stage: Stage, inputs: Mapping[str, Any], received: Tensor | None) -> Any:
        """Run one stage.

        Args:
            stage: of this rank.
            inputs: keyword arguments of the model's forward, of one microbatch; without labels but
                on the last stage.
            received: hidden states from the stage before.

        Returns:
            Hidden states; on the last stage what the model returns.
        """
        cache = inputs.get("past_key_values")
        if cache is not None and stage.index != self._first_index:
            inputs = {**inputs, "past_key_values": stage.cache_for(cache)}
        with stage.running(received) as passage, self._own_forward():
            output = self._model(**inputs)
            result = passage.finish()
        self.__dict__["output_kind"] = type(output)
        self.__dict__["_cache"] = getattr(output, "past_key_values", None)
        if stage.is_last:
            return output
        if result is None:
            raise EngineError(
                f"Stage {stage.index} of {type(self._model).__name__} has run without meeting its "
                f"last layer: its forward does not go through its list of layers."
            )
        return result

    def take_cache(self) -> Any:
        """The key-value cache that the model returned last, which is let go of here."""
        taken = self._cache
        self.__dict__["_cache"] = None
        return taken

    @contextmanager
    def _own_forward(self) -> Iterator[None]:
        """The model's own forward is in place inside, not the one that runs a schedule.

        It is called as a module, so that what was hooked to it runs once for every stage.
        """
        attributes = self._model.__dict__
        had, outer = "forward" in attributes, attributes.get("forward")
        attributes["forward"] = self._forward
        try:
            yield
        finally:
            if had:
                attributes["forward"] = outer
            else:
                del attributes["forward"]


class SplitModel(NamedTuple):
    """A model of which this rank keeps some stages.

    Attributes:
        stages: by index.
        kind: of its layers.
        runner: calls the model as one of them.
        undo: puts every module back.
    """

    stages: Mapping[int, Stage]
    kind: LayerKind
    runner: StageRunner
    undo: Callable[[], None]


def split_model(
    model: nn.Module, body: Body, counts: Sequence[int], local: Sequence[int]
) -> SplitModel:
    """Put stand-ins where this rank's stages are not. In place.

    Args:
        model: whole.
        body: its parts.
        counts: layers of each stage.
        local: the stages of this rank.
    """
    originals = [(place, place.module) for place in (*body.before, *body.layers, *body.after)]
    kind = LayerKind(body.layers[0].module)
    stages = {index: _make_stage(body, counts, index, kind) for index in local}
    runner = StageRunner(model, min(local))
    kept = {id(module) for stage in stages.values() for module in stage.modules}
    for stage in stages.values():
        for place, module in stage.swaps:
            if id(place.module) not in kept and place not in body.dropout:
                place.parent._modules[place.key] = module
    # At whichever layer runs first on this rank.
    handles = [stage.layer_ends[0].register_forward_hook(kind.look_at) for stage in stages.values()]

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for place, module in originals:
            place.parent._modules[place.key] = module

    return SplitModel(stages, kind, runner, undo)


def _make_stage(body: Body, counts: Sequence[int], index: int, kind: LayerKind) -> Stage:
    passage = Passage()
    first, last = sum(counts[:index]), sum(counts[: index + 1])
    is_first, is_last = index == 0, index == len(counts) - 1

    def outside(places: Sequence[Place], *, here: bool, comes_first: bool) -> Iterator[Swap]:
        for place in places:
            stand_in = Elsewhere(place.path, comes_first=comes_first, passage=passage)
            yield Swap(place, place.module if here else stand_in)

    swaps = [*outside(body.before, here=is_first, comes_first=True)]
    for number, place in enumerate(body.layers):
        module = place.module
        if not first <= number < last:
            module = LayerElsewhere(
                module,
                number,
                takes=number == last,
                gives=number == 0,
                kind=kind,
                passage=passage,
            )
        elif number == first and not is_first:
            module = Entrance(module, passage)
        swaps.append(Swap(place, module))
    swaps += outside(body.after, here=is_last, comes_first=False)
    own = [p.module for p, module in swaps if module is p.module or isinstance(module, Entrance)]
    for place in body.dropout:
        acts = DropoutSomewhere(place.module, is_first=is_first, is_last=is_last, passage=passage)
        swaps.append(Swap(place, acts))
    ends = (body.layers[first].module, body.layers[last - 1].module)
    return Stage(index, len(counts), swaps=swaps, modules=own, layer_ends=ends, passage=passage)
