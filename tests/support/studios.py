"""A studio without a model, on a clock that only it moves: steps cost what a curve says."""

from dataclasses import dataclass, field

from engine.errors import RequestError
from serving.studio import Drawn
from serving.wish import Wish

PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(eq=False)
class FakeSketch:
    """A picture that counts; its file is its prompt, seed and steps."""

    studio: "FakeStudio"
    wish: Wish
    index: int
    total: int
    calls: int = 0
    runs: int = 0

    @property
    def bucket(self):
        fields = self.wish.fields
        return (
            fields.get("height"),
            fields.get("guidance_scale") == 1.0,
            self.wish.exact and id(self),
        )

    @property
    def run_is_over(self):
        return self.runs == 0 or self.calls in (self.total // 2 if self.hires else -1, self.total)

    @property
    def hires(self):
        return self.wish.fields.get("hires") is not None and self.runs < 2

    @property
    def is_done(self):
        return self.runs > 0 and self.calls == self.total

    def enter(self):
        self.studio.do("enter", self)
        self.runs += 1

    def preview(self):
        calls = self.calls
        return lambda: b"\xff\xd8\xff" + b"%d" % calls

    def finish(self):
        self.studio.do("finish", self)
        made = {"prompt": self.wish.fields["prompt"], "seed": self.wish.fields["seed"][self.index]}
        return Drawn(data=PNG + repr((made, self.calls)).encode(), settings=made)


@dataclass(eq=False)
class FakeStudio:
    """What a loop draws with; `now` is the time.

    done: what was done, as (stage, prompt); sizes: rows of each step; buckets: of each step
    fail: of a prompt and a stage, what to raise; most: rows that fit into memory
    """

    now: float = 0.0
    done: list = field(default_factory=list)
    sizes: list = field(default_factory=list)
    buckets: list = field(default_factory=list)
    fail: dict = field(default_factory=dict)
    most: int = 10**6
    hooks: dict = field(default_factory=dict)
    texts_cost: float = 0.5
    slope: float = 0.5

    def clock(self):
        return self.now

    def do(self, stage, sketch):
        prompt = sketch.wish.fields["prompt"]
        self.done.append((stage, prompt))
        if hook := self.hooks.get((stage, prompt)):
            hook()
        if error := self.fail.get((stage, prompt)):
            raise error

    def sketches(self, wish):
        self.now += self.texts_cost
        prompt = wish.fields["prompt"]
        self.done.append(("texts", prompt))
        if hook := self.hooks.get(("texts", prompt)):
            hook()
        if prompt == "refused":
            raise RequestError("the prompt is refused")
        total = wish.fields.get("num_inference_steps") or 20
        return [FakeSketch(self, wish, index, total) for index in range(wish.count)]

    def step(self, sketches):
        assert len({sketch.bucket for sketch in sketches}) == 1
        self.now += 1 + self.slope * (len(sketches) - 1)
        for sketch in sketches:
            self.do("step", sketch)
        if len(sketches) > self.most:
            raise MemoryError
        self.sizes.append(len(sketches))
        self.buckets.append(sketches[0].bucket)
        for sketch in sketches:
            sketch.calls += 1
