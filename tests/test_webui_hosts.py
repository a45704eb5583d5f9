"""Real WebUIs with this checkout among their extensions, over their own servers.

Each is started on a folder of its own (--data-dir), so that the user's is not touched.
"""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from osdface_core.devices import best_dtype
from osdface_core.ldm.osediff import load_osediff
from osdface_core.ldm.text import empty_text
from osdface_core.osediff.upscale import UpscaleOptions, upscale
from osdface_core.sd21.files import BASE
from tests.conftest import ROOT
from tests.frontend import CHROMIUM, chromium
from tests.small_sd21 import SMALL, small_checkpoint, small_osediff, text_encoder

COMMON = (
    "--skip-torch-cuda-test",
    "--skip-prepare-environment",
    "--skip-python-version-check",
    "--skip-install",
    "--api",
    "--server-name",
    "127.0.0.1",
)
A1111 = "--use-cpu all --no-half --precision full --disable-nan-check --do-not-download-clip"
ARGUMENTS = {
    "forge": ("--always-cpu",),
    "a1111": (
        *A1111.split(),
        "--no-download-sd-model",
        "--skip-load-model-at-start",
        "--no-hashing",
    ),
    "neo": ("--cpu",),
}
STARTED = 600
# A script of the host that puts a photograph in place of what the random weights make, just before
# faces are restored; presses Reload UI; has the host restore faces without a generation; and keeps
# the host busy.
HELPER = """
import os
import numpy as np
import torch
from PIL import Image
from modules import call_queue, face_restoration, script_callbacks, scripts, shared

class Photograph(scripts.Script):
    def title(self):
        return "photograph"
    def show(self, is_img2img):
        return scripts.AlwaysVisible
    def postprocess_batch_list(self, p, pp, *args, **kwargs):
        p.extra_generation_params["Made"] = float(sum(x.float().mean() for x in pp.images))
        picture = np.array(Image.open(os.environ["OSDFACE_PHOTOGRAPH"]).convert("RGB"))
        pp.images[:] = [torch.from_numpy(picture / 255.0).movedim(-1, 0).float() for _ in pp.images]
        shared.state.textinfo = "photograph"

def restored():
    picture = np.array(Image.open(os.environ["OSDFACE_PHOTOGRAPH"]).convert("RGB"))
    return bool((face_restoration.restore_faces(picture.copy()) != picture).any())

def routes(demo, app):
    app.add_api_route("/test/reload", shared.state.request_restart, methods=["POST"])
    app.add_api_route("/test/restored", restored, methods=["POST"])
    app.add_api_route("/test/busy", lambda: bool(call_queue.queue_lock.acquire()), methods=["POST"])
    app.add_api_route("/test/idle", lambda: call_queue.queue_lock.release(), methods=["POST"])

script_callbacks.on_app_started(routes)
"""


# A script of the host that lets OSEDiff's networks be small.
SMALL_OSEDIFF = """
import importlib.util
from functools import partial

from osdface_webui import backbone

spec = importlib.util.spec_from_file_location("small_sd21", {path!r})
small = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small)
backbone.load_osediff = partial(backbone.load_osediff, shapes=small.SMALL)
backbone.parse_weights = lambda tensors, name: small.small_osediff()
"""


@dataclass
class Server:
    """A running WebUI.

    host: its name. place: its data folder. address: of its server. process: the server.
    """

    host: str
    place: Path
    address: str
    process: subprocess.Popen[bytes]
    auth: tuple[str, str] | None = None
    log: Path = field(default_factory=Path)

    def get(self, path: str) -> Any:
        answer = requests.get(self.address + path, auth=self.auth, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def post(self, path: str, body: dict[str, Any] | None = None, **given: Any) -> Any:
        given = {"auth": self.auth, "timeout": 900} | given
        return requests.post(self.address + path, json=body or {}, **given)

    def restore(self, image: Image.Image, **options: Any) -> dict[str, Any]:
        answer = self.post("/osdface/v1/restore", {"image": encoded(image), **options})
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()
        return result

    def set(self, **options: Any) -> None:
        answer = self.post("/sdapi/v1/options", options)
        assert answer.ok, answer.text

    def generate(
        self, prompt: str = "somebody", way: str = "txt2img", **given: Any
    ) -> tuple[Image.Image, str]:
        """A picture by txt2img in one step, with faces restored, and its parameters."""
        images = self.generate_all(prompt, way, **given)
        return images[0], images[0].info["parameters"]

    def generate_all(
        self, prompt: str = "somebody", way: str = "txt2img", **given: Any
    ) -> list[Image.Image]:
        body = {
            "prompt": prompt,
            "steps": 1,
            "width": 64,
            "height": 64,
            "sampler_name": "Euler",
            "seed": 1,
            "restore_faces": True,
            "override_settings": {"face_restoration_model": "OSDFace"},
            "override_settings_restore_afterwards": True,
        }
        answer = self.post(f"/sdapi/v1/{way}", body | given)
        assert answer.status_code == 200, answer.text
        return [decoded(image) for image in answer.json()["images"]]

    def until(self, what: Callable[[dict[str, Any]], bool]) -> None:
        """Waits until the host's progress is as wanted."""
        for _ in range(20 * STARTED):
            if what(self.get("/sdapi/v1/progress?skip_current_image=true")):
                return
            time.sleep(0.05)
        raise AssertionError(f"no such progress within {STARTED} s")

    @property
    def memory(self) -> float:
        """Bytes that the server's process holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    def wait(self, since: int = 0) -> int:
        """Waits until it says once more that it has started; gives the place in its log."""
        for _ in range(STARTED):
            text = self.log.read_text(encoding="utf-8", errors="replace")
            found = text.find("Startup time:", since)
            if found >= 0:
                time.sleep(1)
                return found + 1
            assert self.process.poll() is None, text[-3000:]
            time.sleep(1)
        raise AssertionError(f"no start within {STARTED} s: {text[-3000:]}")


def report(words: str) -> None:
    """A measured figure, shown by -s."""
    sys.stdout.write(f"\n{words}\n")


def encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def difference(a: Image.Image, b: Image.Image) -> int:
    assert a.size == b.size
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def add_small_osediff(place: Path) -> None:
    """A small Stable Diffusion 2.1-base and OSEDiff's weights for it, in a host's data folder."""
    for name, tensors in (
        (f"Stable-diffusion/{BASE.name}", small_checkpoint() | text_encoder(2)),
        ("osediff/osediff.safetensors", {"unused": torch.zeros(1)}),
    ):
        path = place / "models" / name
        path.parent.mkdir(parents=True)
        save_file(tensors, path)
    script = place / "extensions" / "test_small" / "scripts" / "small.py"
    script.parent.mkdir(parents=True)
    script.write_text(SMALL_OSEDIFF.format(path=str(ROOT / "tests" / "small_sd21.py")))


def installed(host: str) -> Path:
    """The folder of a host; the test is skipped where there is none."""
    folder = Path(os.environ.get(f"OSDFACE_{host.upper()}_DIR", "/nowhere"))
    if not folder.is_dir():
        pytest.skip(f"no WebUI: set OSDFACE_{host.upper()}_DIR to its folder")
    return folder


def start(host: str, place: Path, photograph: Path, *arguments: str) -> Server:
    folder = installed(host)
    own = folder / "venv" / "bin" / "python"
    extensions = place / "extensions"
    extensions.mkdir(parents=True, exist_ok=True)
    (extensions / "osdface").symlink_to(ROOT)
    (place / "tmp").mkdir()  # Forge-Neo does not make it
    helper = extensions / "test_helper" / "scripts"
    helper.mkdir(parents=True)
    (helper / "photograph.py").write_text(HELPER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = place / "log.txt"
    command = [
        str(own if own.exists() else sys.executable),
        "launch.py",
        *COMMON,
        *ARGUMENTS[host],
        *("--port", str(port), "--data-dir", str(place)),
        # Else Forge and Forge-Neo keep their own scripts from the page, as not of the data folder.
        *("--gradio-allowed-path", str(folder)),
        *arguments,
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "1"}
            | os.environ
            | {
                "HF_HUB_OFFLINE": "1",
                "OSDFACE_PHOTOGRAPH": str(photograph),
                "GRADIO_ANALYTICS_ENABLED": "False",
            },
        )
    server = Server(host, place, f"http://127.0.0.1:{port}", process, log=log)
    try:
        server.wait()
    except BaseException:
        stop(server)
        raise
    return server


def stop(server: Server) -> None:
    server.process.terminate()
    try:
        server.process.wait(20)
    except subprocess.TimeoutExpired:
        server.process.kill()


@pytest.fixture(scope="module")
def photograph(photographs: Path) -> Path:
    return photographs / "astronaut.png"


@pytest.fixture(scope="module", params=list(ARGUMENTS))
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, photograph: Path
) -> Iterator[Server]:
    """Each host without any weights but OSEDiff's small ones, behind a password."""
    installed(request.param)
    place = tmp_path_factory.mktemp(request.param)
    add_small_osediff(place)
    server = start(request.param, place, photograph, "--api-auth", "somebody:word")
    server.auth = ("somebody", "word")
    yield server
    stop(server)


def test_one_restorer_is_registered_at_the_start_and_after_a_reload(server: Server) -> None:
    def names() -> list[str]:
        return [x["name"] for x in server.get("/sdapi/v1/face-restorers")]

    assert names().count("OSDFace") == 1
    seen = server.wait()
    assert server.post("/test/reload").ok
    server.wait(seen)
    assert names().count("OSDFace") == 1
    assert server.post("/osdface/v1/faces", {"image": encoded(Image.new("RGB", (64, 64)))}).ok


def test_own_routes_want_the_password(server: Server) -> None:
    for route in ("restore", "faces"):
        for auth in (None, ("somebody", "wrong"), ("nobody", "word")):
            answer = server.post(f"/osdface/v1/{route}", {"image": ""}, auth=auth)
            assert answer.status_code == 401, (route, auth)


def test_own_routes_wait_for_their_turn(server: Server) -> None:
    body = {"image": encoded(Image.new("RGB", (64, 64)))}
    answers: list[Any] = []

    def ask(route: str) -> None:
        answers.append(server.post(f"/osdface/v1/{route}", body))

    asked = [threading.Thread(target=ask, args=[route]) for route in ("restore", "faces")]
    ask("restore")  # which reads the detector
    assert server.post("/test/busy").json() is True
    try:
        for thread in asked:
            thread.start()
        time.sleep(3)
        assert len(answers) == 1
    finally:
        assert server.post("/test/idle").ok
    for thread in asked:
        thread.join()
    assert [answer.status_code for answer in answers] == [200, 200, 200]


def test_a_photograph_comes_back_changed_in_its_face_alone(
    server: Server, photograph: Path
) -> None:
    image = Image.open(photograph).convert("RGB")
    result = server.restore(image)
    after, mask = decoded(result["image"]), np.asarray(decoded(result["mask"]))
    assert after.mode == "RGB" and after.size == image.size == mask.shape[::-1]
    changed = np.abs(np.asarray(after, dtype=int) - np.asarray(image, dtype=int)).max(-1)
    assert changed[mask == 0].max() == 0
    assert changed[mask > 200].mean() > 1
    assert [face["verdict"] for face in result["faces"]] == ["chosen"]
    assert "built-in" in result["model"]


def test_transparency_and_grey_stay(server: Server, photograph: Path) -> None:
    image = Image.open(photograph).convert("RGBA")
    fade = Image.linear_gradient("L").resize(image.size)
    image.putalpha(fade)
    after = decoded(server.restore(image)["image"])
    assert after.mode == "RGBA" and difference(after.getchannel("A"), fade) == 0
    grey = image.convert("L")
    after = decoded(server.restore(grey)["image"])
    assert after.mode == "L" and difference(after, grey) > 10
    result = server.restore(Image.fromarray(np.array(grey).astype(np.uint16) * 257))
    assert difference(decoded(result["image"]), after) == 0
    assert "has 8 now" in result["report"]


def test_a_picture_without_a_face_comes_back_bit_by_bit(server: Server) -> None:
    image = Image.effect_noise((8000, 500), 60).convert("RGB")
    result = server.restore(image)
    assert difference(decoded(result["image"]), image) == 0
    assert result["faces"] == [] and result["model"] == ""


def test_what_is_wrong_is_told_in_words(server: Server, photograph: Path) -> None:
    image = encoded(Image.open(photograph))
    for body, words in (
        ({"image": "abc"}, "no picture"),
        ({"image": image, "mask_type": "round"}, "parsing"),
        ({"image": image, "select": "by index", "indices": "one"}, "numbers and ranges"),
        ({"image": image, "strength": 7}, "less than or equal to 1"),
    ):
        answer = server.post("/osdface/v1/restore", body)
        assert answer.status_code == 422 and words in answer.text


def test_the_hosts_own_extras_do_nothing_of_ours_unasked(server: Server) -> None:
    image = Image.effect_noise((32, 32), 60).convert("RGB")
    answer = server.post("/sdapi/v1/extra-single-image", {"image": encoded(image)})
    assert answer.ok, answer.text
    assert difference(decoded(answer.json()["image"]).convert("RGB"), image) == 0


def test_osediff_enlarges_a_picture_in_extras(server: Server) -> None:
    assert [x["name"] for x in server.get("/sdapi/v1/upscalers")].count("OSEDiff") == 1
    # Half precision is what `automatic` takes where the processor has it.
    assert server.post("/sdapi/v1/options", {"osdface_precision": "fp32"}).ok
    image = Image.effect_noise((40, 24), 60).convert("RGB")
    body = {"image": encoded(image), "upscaling_resize": 2, "upscaler_1": "OSEDiff"}
    answer = server.post("/sdapi/v1/extra-single-image", body)
    assert answer.ok, answer.text
    after = np.array(decoded(answer.json()["image"]).convert("RGB"))
    base = server.place / "models" / "Stable-diffusion" / BASE.name
    networks = load_osediff(
        base, small_osediff(), device=torch.device("cpu"), dtype=torch.float32, shapes=SMALL
    )
    given = torch.from_numpy(np.array(image))[None] / 255
    wanted = upscale(given, empty_text(base), networks, UpscaleOptions(2.0)).pictures[0] * 255
    worst = float((torch.from_numpy(after) - wanted).abs().max())
    report(f"{server.host}: differs by {worst:.2f} of 255")
    assert worst <= 1
    plain = np.array(image.resize((80, 48), Image.Resampling.BICUBIC))
    assert np.abs(after.astype(int) - plain).mean() > 20


def test_an_error_is_reported_and_the_picture_comes_back(server: Server) -> None:
    server.set(face_restoration_model="OSDFace")
    assert server.post("/test/restored").json() is True
    try:
        server.set(osdface_base="gone.safetensors")
        before = server.log.stat().st_size
        assert server.post("/test/restored").json() is False
    finally:
        server.set(osdface_base="automatic")
    told = server.log.read_bytes()[before:].decode(errors="replace")
    assert "*** OSDFace: " in told and "gone.safetensors" in told and "Traceback" in told
    assert server.post("/test/restored").json() is True


def test_the_users_wish_to_stop_is_obeyed(server: Server) -> None:
    image = Image.effect_noise((6000, 6000), 60).convert("RGB")
    answers: list[Any] = []
    body = {"image": encoded(image), "any_angle": True, "confidence": 0.05}
    asked = threading.Thread(
        target=lambda: answers.append(server.post("/osdface/v1/restore", body))
    )
    asked.start()
    server.until(lambda progress: progress["state"]["job"] == "OSDFace")
    assert server.post("/sdapi/v1/interrupt").ok
    asked.join()
    assert answers[0].status_code == 409 and "stopped" in answers[0].text
    # The next one is not stopped by it.
    assert server.restore(Image.new("RGB", (64, 64)))["faces"] == []


@pytest.fixture
def extras(server: Server) -> Iterator[Any]:
    """The Extras tab in Chromium, with OSDFace's accordion open, which turns it on."""
    pytest.importorskip(
        "playwright", reason="Playwright drives the browser: pip install playwright"
    )
    if not Path(CHROMIUM).is_file():
        pytest.skip("no Chromium: install it, or set CHROMIUM_PATH to its program")
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1100})
        page.set_default_timeout(1000 * STARTED)
        page.goto(server.address, wait_until="domcontentloaded")
        page.locator("#tabs button", has_text="Extras").first.click()
        box = page.locator(".input-accordion:visible", has_text="OSDFace").last
        box.wait_for()
        page.wait_for_function("() => typeof submit_extras === 'function'")
        page.wait_for_timeout(3000)
        box.locator(".label-wrap").first.click()
        page.osdface = box
        yield page


def made(folder: Path, count: int, pattern: str = "*.png") -> list[Path]:
    """The pictures that the host writes into a folder, when there are so many."""
    for _ in range(600):
        files = sorted(folder.glob(pattern))
        if len(files) >= count:
            time.sleep(1)
            return files
        time.sleep(0.5)
    raise AssertionError(f"{len(files)} of {count} pictures within 300 s")


def with_parameters(image: Image.Image, path: Path) -> None:
    """Saves a picture as if it was generated; else Forge seeks words hidden in pixels, for 30 s."""
    text = PngInfo()
    text.add_text("parameters", "somebody")
    image.save(path, pnginfo=text)


def test_extras_keep_what_an_uploaded_picture_says(
    server: Server, extras: Any, photograph: Path, tmp_path: Path
) -> None:
    image = Image.open(photograph).convert("RGB")
    with_parameters(image, tmp_path / "photograph.png")
    # White to the left of the middle of the face; of another size than the picture.
    keep = Image.new("L", (256, 256))
    keep.paste(255, (0, 0, 112, 256))
    keep.save(tmp_path / "keep.png")
    pattern = "output*/extras-images/*.png"  # Forge-Neo has it without an s
    before = set(server.place.glob(pattern))
    extras.locator("#extras_image input[type=file]").set_input_files(tmp_path / "photograph.png")
    extras.osdface.get_by_text("More", exact=True).click()
    extras.osdface.locator("input[type=file]").set_input_files(tmp_path / "keep.png")
    extras.osdface.locator("img:visible").first.wait_for()
    extras.wait_for_timeout(1000)
    extras.locator("#extras_generate").evaluate("button => button.click()")
    (path,) = set(made(server.place, len(before) + 1, pattern)) - before
    after = Image.open(path)
    assert any("1 face found" in str(text) for text in after.info.values())
    changed = np.abs(np.asarray(after.convert("RGB"), dtype=int) - np.asarray(image)).max(-1)
    assert after.size == image.size
    assert changed[:, :222].max() == 0
    assert (changed[:, 228:] > 0).sum() > 1000


def test_extras_do_all_pictures_of_a_folder(
    server: Server, extras: Any, photograph: Path, tmp_path: Path
) -> None:
    given, done = tmp_path / "given", tmp_path / "done"
    given.mkdir()
    done.mkdir()
    photo = Image.open(photograph).convert("RGB")
    pictures = {
        "a": photo,
        "b": Image.effect_noise((300, 200), 60).convert("RGB"),
        "c": photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    }
    for name, image in pictures.items():
        with_parameters(image, given / f"{name}.png")
    extras.locator("#mode_extras button", has_text="Batch from Directory").first.click()
    extras.locator("#extras_batch_input_dir textarea").fill(str(given))
    extras.locator("#extras_batch_output_dir textarea").fill(str(done))
    extras.wait_for_timeout(3000)  # the host is told of the tab
    extras.locator("#extras_generate").evaluate("button => button.click()")
    files = made(done, len(pictures))
    assert len(files) == len(pictures)
    for path, (name, image) in zip(files, pictures.items(), strict=True):
        after = Image.open(path)
        told = " ".join(str(text) for text in after.info.values())
        assert (difference(after.convert("RGB"), image) > 5) == (name != "b")
        assert ("built-in" in told) == (name != "b"), told


# With full-size networks


@pytest.fixture(scope="module")
def whole_checkpoint(stand_ins: Path) -> Path:
    """The stand-in checkpoint with a text encoder of random numbers, which the hosts want."""
    path = stand_ins / "v2-1_512-with-text.safetensors"
    if not path.is_file():
        tensors = load_file(stand_ins / "v2-1_512-seeded.safetensors")
        save_file(tensors | text_encoder(23), path)
    return path


@pytest.fixture(scope="module")
def other_checkpoint(stand_ins: Path) -> Path:
    """A checkpoint of Stable Diffusion 1.5's shapes in fp16: the stand-in's tensors in those."""
    path = stand_ins / "v1-5-seeded.safetensors"
    if path.is_file():
        return path
    tensors = load_file(stand_ins / "v2-1_512-seeded.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            tensors[name] = tensor[:, :768]
        elif name.startswith("model.") and name.endswith(("proj_in.weight", "proj_out.weight")):
            tensors[name] = tensor[:, :, None, None]
    tensors = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    width, names = 768, "cond_stage_model.transformer.text_model."
    generator = torch.Generator().manual_seed(0)

    def layer(name: str, out: int, inside: int = 0) -> None:
        """A linear layer, or without `inside` a norm."""
        shape = (out, inside) if inside else (out,)
        weight = torch.randn(*shape, generator=generator) * 0.02 + (not inside)
        tensors[f"{names}{name}.weight"] = weight.half()
        tensors[f"{names}{name}.bias"] = torch.zeros(out).half()

    for name, count in (("token", 49408), ("position", 77)):
        table = torch.randn(count, width, generator=generator) * 0.02
        tensors[f"{names}embeddings.{name}_embedding.weight"] = table.half()
    for i in range(12):
        block = f"encoder.layers.{i}."
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer(f"{block}self_attn.{projection}", width, width)
        layer(f"{block}mlp.fc1", 4 * width, width)
        layer(f"{block}mlp.fc2", width, 4 * width)
        layer(f"{block}layer_norm1", width)
        layer(f"{block}layer_norm2", width)
    layer("final_layer_norm", width)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module", params=list(ARGUMENTS))
def full(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    photograph: Path,
) -> Iterator[Server]:
    """Each host with OSDFace's stand-in weights and Stable Diffusion 2.1's. That is the loaded
    checkpoint but on Forge-Neo, which does not know it and loads another.

    The accordion OSDFace is shown in txt2img and img2img too.
    """
    folder = installed(request.param)
    # Gigabytes are read and written for the checkpoint: not where no host is there to take it.
    stand_ins: Path = request.getfixturevalue("stand_ins")
    whole_checkpoint: Path = request.getfixturevalue("whole_checkpoint")
    place = tmp_path_factory.mktemp(f"{request.param}_full")
    models = place / "models"
    for name in ("Stable-diffusion", "Lora"):
        (models / name).mkdir(parents=True)
    (models / "osdface").symlink_to(stand_ins / "osdface")
    checkpoint = models / "Stable-diffusion" / "v2-1_512-ema-pruned.safetensors"
    checkpoint.symlink_to(whole_checkpoint)
    settings: dict[str, Any] = {"postprocessing_enable_in_main_ui": ["OSDFace"]}
    if request.param == "neo":
        other: Path = request.getfixturevalue("other_checkpoint")
        (models / "Stable-diffusion" / other.name).symlink_to(other)
        settings["sd_model_checkpoint"] = other.name
        # Without it the host takes the settings for an older version's, and asks what to do.
        settings["VERSION_UID"] = "PY313"
    (place / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    if request.param == "a1111":
        # Without it the host runs the UNet to see what it predicts.
        configs = "repositories/stable-diffusion-stability-ai/configs/stable-diffusion"
        checkpoint.with_suffix(".yaml").symlink_to(folder / configs / "v2-inference.yaml")
    lora = {}
    for name in ("input_blocks_1_1_transformer_blocks_0_attn1_to_q", "middle_block_1_proj_in"):
        width = 320 if "input" in name else 1280
        key = f"lora_unet_{name}"
        lora[f"{key}.lora_up.weight"] = torch.ones(width, 4)
        lora[f"{key}.lora_down.weight"] = torch.ones(4, width)
        lora[f"{key}.alpha"] = torch.tensor(4.0)
    save_file(lora, models / "Lora" / "strong.safetensors")
    server = start(request.param, place, photograph)
    yield server
    stop(server)


def where(full: Server) -> str:
    """How Stable Diffusion 2.1 is had, in the words of the picture's parameters."""
    return "beside the loaded checkpoint" if full.host == "neo" else "as loaded"


@pytest.mark.full
def test_the_loaded_checkpoint_is_used_and_no_second_one_is_read(
    full: Server, photograph: Path
) -> None:
    if full.host == "neo":
        pytest.skip("no WebUI: Forge-Neo has no Stable Diffusion 2 to share")
    plain, _ = full.generate(restore_faces=False)
    before = full.memory
    image, parameters = full.generate()
    grown = full.memory - before
    assert difference(plain, image) > 5
    assert "Face restoration: OSDFace" in parameters
    assert "as loaded" in parameters
    # UNet and autoencoder have 3.8 GB in fp32; the embedder, the LoRA and activations have less.
    report(f"{full.host}: {before / 2**30:.2f} GiB before, {grown / 2**30:+.2f} GiB")
    assert grown < 1.9 * 2**30


BUILTIN = "built-in (small)"
# The precision that is fastest on this processor.
FASTEST = "bf16" if best_dtype(torch.device("cpu")) == torch.bfloat16 else "fp32"
# Faces by the built-in model, for speed: the way of a generation does not ask which it is.
FAST = {"override_settings": {"face_restoration_model": "OSDFace", "osdface_base": BUILTIN}}


@pytest.fixture(scope="module")
def plain(full: Server, photograph: Path) -> Image.Image:
    """The photograph as a generation gives it that restores nothing."""
    image, parameters = full.generate(restore_faces=False)
    assert difference(image, Image.open(photograph).convert("RGB")) == 0
    assert "OSDFace" not in parameters
    return image


@pytest.fixture(scope="module")
def restored(full: Server, plain: Image.Image) -> Image.Image:
    """The photograph as txt2img gives it with faces restored."""
    image, parameters = full.generate(**FAST)
    assert difference(plain, image) > 5
    assert "Face restoration: OSDFace" in parameters and "built-in" in parameters
    return image


@pytest.mark.full
def test_hires_fix_restores_as_txt2img_does(full: Server, restored: Image.Image) -> None:
    hires: dict[str, Any] = {
        "enable_hr": True,
        "hr_scale": 2,
        "hr_upscaler": "Latent",
        "hr_second_pass_steps": 1,
        "denoising_strength": 0.5,
    }
    if full.host != "a1111":
        hires["hr_additional_modules"] = ["Use same choices"]
    image, parameters = full.generate(**hires, **FAST)
    assert "Hires upscale: 2" in parameters and "built-in" in parameters
    assert difference(image, restored) == 0


@pytest.mark.full
def test_img2img_restores_as_txt2img_does(full: Server, restored: Image.Image) -> None:
    given = encoded(Image.effect_noise((64, 64), 60).convert("RGB"))
    image, parameters = full.generate(
        way="img2img", init_images=[given], denoising_strength=0.5, **FAST
    )
    assert "Denoising strength: 0.5" in parameters and "built-in" in parameters
    assert difference(image, restored) == 0


@pytest.mark.full
@pytest.mark.parametrize("way", ["txt2img", "img2img"])
def test_the_accordion_works_while_generating(
    full: Server, restored: Image.Image, way: str
) -> None:
    given: dict[str, Any] = {"alwayson_scripts": {"OSDFace": {"args": [True]}}}
    if way == "img2img":
        given["init_images"] = [encoded(Image.effect_noise((64, 64), 60).convert("RGB"))]
    image, parameters = full.generate(way=way, restore_faces=False, **given, **FAST)
    assert "1 face found" in parameters and "built-in" in parameters
    assert "Face restoration" not in parameters
    assert difference(image, restored) == 0


@pytest.mark.full
def test_the_plot_has_an_axis_of_restorers(
    full: Server, plain: Image.Image, restored: Image.Image
) -> None:
    plots = full.get("/sdapi/v1/script-info")
    plot = next(x for x in plots if x["name"] == "x/y/z plot" and not x["is_img2img"])
    axes = plot["args"][0]["choices"]
    values: list[Any] = [argument["value"] for argument in plot["args"]]
    values[0] = axes.index("[OSDFace] Face restorer")
    values[2] = ["None", "OSDFace"]
    values[3] = values[6] = axes.index("Nothing")
    names = [argument["label"] for argument in plot["args"]]
    values[names.index("Include Sub Images")] = True
    grid, *images = full.generate_all(
        restore_faces=False,
        override_settings={"osdface_base": BUILTIN},
        script_name="x/y/z plot",
        script_args=values,
    )
    assert grid.size[0] >= 2 * plain.size[0]
    assert [difference(*pair) for pair in zip(images, (plain, restored), strict=True)] == [0, 0]


@pytest.mark.full
def test_a_generation_that_is_interrupted_keeps_its_faces(full: Server, plain: Image.Image) -> None:
    made: list[tuple[Image.Image, str]] = []
    asked = threading.Thread(target=lambda: made.append(full.generate()))
    asked.start()
    full.until(lambda progress: progress["textinfo"] == "photograph")
    assert full.post("/sdapi/v1/interrupt").ok
    asked.join()
    ((image, parameters),) = made
    assert "OSDFace model" not in parameters
    assert difference(image, plain) == 0


@pytest.mark.full
def test_networks_leave_when_the_settings_say_so(full: Server) -> None:
    if full.host != "neo":
        pytest.skip("no WebUI: only Forge-Neo has Stable Diffusion 2.1 beside its checkpoint")
    image, _ = full.generate()
    kept = full.memory
    try:
        full.set(osdface_keep_loaded=False, face_restoration_unload=True)
        again, _ = full.generate()
        left = full.memory
    finally:
        full.set(osdface_keep_loaded=True, face_restoration_unload=False)
    assert difference(again, image) == 0
    # Stable Diffusion 2.1 beside the loaded checkpoint has 1.9 GB in half precision.
    report(f"{full.host}: {kept / 2**30:.2f} GiB kept, {left / 2**30:.2f} GiB else")
    assert kept - left > 1.5e9


@pytest.mark.full
def test_a_lora_of_the_prompt_does_not_touch_the_restoring(full: Server) -> None:
    without, before = full.generate()
    with_lora, after = full.generate("somebody <lora:strong:1>")
    # What the networks made, before the photograph took its place, tells that the LoRA was there.
    made = [text.partition("Made: ")[2].partition(",")[0] for text in (before, after)]
    assert all(made) and made[0] != made[1]
    assert difference(without, with_lora) == 0
    again, _ = full.generate()
    assert difference(without, again) == 0


@pytest.mark.full
def test_memory_comes_back_after_ten_pictures(full: Server) -> None:
    # AUTOMATIC1111 runs in fp32 here, in which a picture takes several times as long.
    full.set(osdface_precision=FASTEST)
    try:
        full.generate(cfg_scale=1)
        held = [full.memory]
        for _ in range(10):
            full.generate(cfg_scale=1)
            held.append(full.memory)
    finally:
        full.set(osdface_precision="automatic")
    report(f"{full.host}: {[round(x / 2**30, 2) for x in held]} GiB")
    assert held[-1] - held[2] < 0.3 * 2**30


@pytest.mark.full
@pytest.mark.parametrize("name", ["astronaut_lq", "portrait_severe_lq"])
def test_a_crop_is_restored_as_the_released_code_does(
    full: Server,
    name: str,
    golden: Path,
    truth: Callable[[str], torch.Tensor],
    crop: Callable[[str], torch.Tensor],
) -> None:
    # Half precision is what `automatic` takes where the processor has it.
    assert full.post("/sdapi/v1/options", {"osdface_precision": "fp32"}).ok
    given = Image.fromarray((crop(name)[0] * 255).round().byte().numpy())
    result = full.restore(given, aligned=True)
    if where(full) not in result["model"]:
        full.generate(restore_faces=False)  # which loads the checkpoint
        result = full.restore(given, aligned=True)
    assert where(full) in result["model"]
    after = torch.from_numpy(np.array(decoded(result["image"]))).float() / 255
    worst = float((after - truth(f"{name}.image")[0].movedim(0, -1)).abs().max())
    report(f"{full.host}: {name} differs by {worst:.1e}, of which 8 bits are {0.5 / 255:.1e}")
    assert worst <= 1e-3 + 0.5 / 255
