"""A runner without a model, on a clock that only it moves: steps cost what a curve says."""

from dataclasses import dataclass, field

from engine.errors import RequestError
from serving.picture_request import PictureRequest
from serving.unfinished_picture import FinishedPicture

PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(eq=False)
class FakePicture:
    """A picture that counts; its file is its prompt, seed and steps."""

    runner: "FakeModelRunner"
    picture_request: PictureRequest
    index: int
    total: int
    calls: int = 0
    runs: int = 0

    @property
    def bucket(self):
        fields = self.picture_request.fields
        return (
            fields.get("height"),
            fields.get("guidance_scale") == 1.0,
            self.picture_request.exact and id(self),
        )

    @property
    def form(self):
        return str(self.bucket[:2])

    def fitting_rows(self):
        return self.runner.fitting

    @property
    def run_is_over(self):
        return self.runs == 0 or self.calls in (self.total // 2 if self.hires else -1, self.total)

    @property
    def hires(self):
        return self.picture_request.fields.get("hires") is not None and self.runs < 2

    @property
    def is_done(self):
        return self.runs > 0 and self.calls == self.total

    def enter(self):
        self.runner.do("enter", self)
        self.runs += 1

    def preview(self):
        calls = self.calls
        return lambda: b"\xff\xd8\xff" + b"%d" % calls

    def finish(self):
        self.runner.do("finish", self)
        made = {
            "prompt": self.picture_request.fields["prompt"],
            "seed": self.picture_request.fields["seed"][self.index],
        }
        return FinishedPicture(data=PNG + repr((made, self.calls)).encode(), settings=made)


@dataclass(eq=False)
class FakeModelRunner:
    """What a loop draws with; `now` is the time.

    done: what was done, as (stage, prompt); sizes: rows of each step; buckets: of each step
    fail: of a prompt and a stage, what to raise; most: rows that fit into memory, and fitting: what
        is estimated
    """

    now: float = 0.0
    done: list = field(default_factory=list)
    sizes: list = field(default_factory=list)
    buckets: list = field(default_factory=list)
    fail: dict = field(default_factory=dict)
    most: int = 10**6
    fitting: int = 10**6
    hooks: dict = field(default_factory=dict)
    texts_cost: float = 0.5
    slope: float = 0.5

    def clock(self):
        return self.now

    def do(self, stage, unfinished):
        prompt = unfinished.picture_request.fields["prompt"]
        self.done.append((stage, prompt))
        if hook := self.hooks.get((stage, prompt)):
            hook()
        if error := self.fail.get((stage, prompt)):
            raise error

    def unfinished_pictures(self, picture_request):
        self.now += self.texts_cost
        prompt = picture_request.fields["prompt"]
        self.done.append(("texts", prompt))
        if hook := self.hooks.get(("texts", prompt)):
            hook()
        if prompt == "refused":
            raise RequestError("the prompt is refused")
        total = picture_request.fields.get("num_inference_steps") or 20
        return [
            FakePicture(self, picture_request, index, total)
            for index in range(picture_request.count)
        ]

    def step(self, unfinished_pictures):
        assert len({unfinished.bucket for unfinished in unfinished_pictures}) == 1
        self.now += 1 + self.slope * (len(unfinished_pictures) - 1)
        for unfinished in unfinished_pictures:
            self.do("step", unfinished)
        if len(unfinished_pictures) > self.most:
            raise MemoryError
        self.sizes.append(len(unfinished_pictures))
        self.buckets.append(unfinished_pictures[0].bucket)
        for unfinished in unfinished_pictures:
            unfinished.calls += 1
