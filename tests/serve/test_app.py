"""The service over HTTP: what it answers, and what it refuses."""

import base64
import io
import json
import shutil
from hashlib import blake2b
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from flowerray.cli import dispatch
from flowerray.data.images import eval_image
from flowerray.index import command, contents
from flowerray.index.contents import open_index
from flowerray.opening import open_model
from flowerray.serve.app import make_app
from flowerray.serve.service import Served, Service
from tests.serve.conftest import CPU, saved


def test_embed_is_the_models_embedding(client: TestClient, served: Path, photo: bytes) -> None:
    model = command.model_of(open_index(served), CPU)
    crop = eval_image(photo, model.embedder.image_size).transpose(1, 2, 0)
    expected = command.embed_crops(model.embedder, [crop])[0]
    for sent in ({"content": photo}, {"files": {"image": photo}}):
        answer = client.post("/embed", **sent)
        assert answer.status_code == 200
        np.testing.assert_allclose(answer.json()["embedding"], expected, atol=1e-6)


def test_search_is_index_search(
    client: TestClient, served: Path, photo: bytes, tmp_path: Path
) -> None:
    (tmp_path / "photo.jpg").write_bytes(photo)
    index = open_index(served)
    expected = command.search(index, command.model_of(index, CPU), tmp_path / "photo.jpg", 3, 0.2)
    found = client.post("/search?k=3&prior=0.2", content=photo).json()
    assert found["unknown"] == expected["unknown"]
    for one, other in zip(found["neighbours"], expected["neighbours"], strict=True):
        assert one == pytest.approx(other)
    assert len(client.post("/search", files={"image": photo}).json()["neighbours"]) == 10


def test_similar(client: TestClient, served: Path, photo: bytes) -> None:
    other = saved("PNG")
    model = command.model_of(open_index(served), CPU)
    found = client.post("/similar?prior=0.1", files={"image": photo, "other": other}).json()
    emb = [client.post("/embed", content=data).json()["embedding"] for data in (photo, other)]
    assert found["similarity"] == pytest.approx(float(np.dot(*emb)), abs=1e-5)
    assert found["same"] == (found["similarity"] >= model.threshold)
    assert model.calibration is not None
    expected = model.calibration.probability(found["similarity"], 0.1)
    assert found["probability"] == pytest.approx(float(expected))
    same = client.post("/similar", files={"image": photo, "other": photo}).json()
    assert same["same"] and same["similarity"] == pytest.approx(1, abs=1e-5)


def test_formats(client: TestClient) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        assert client.post("/embed", content=saved(kind)).status_code == 200
    assert client.post("/embed", content=saved("PNG", mode="RGBA")).status_code == 200


def test_a_neighbour_can_be_seen_and_explained(client: TestClient, photo: bytes) -> None:
    name = client.post("/search?k=1", content=photo).json()["neighbours"][0]["id"]
    small = client.get("/photograph", params={"id": name})
    assert small.headers["content-type"] == "image/jpeg" and small.content[:2] == b"\xff\xd8"
    why = client.post("/explain", params={"id": name}, content=photo)
    assert why.headers["content-type"] == "image/png" and why.content[1:4] == b"PNG"


def test_only_a_file_with_the_indexed_content_is_shown(served: Path, tmp_path: Path) -> None:
    """Whatever paths an INDEX names: nothing else that this machine has is sent."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(saved("PNG"))
    folder = shutil.copytree(served, tmp_path / "index")
    index = open_index(folder)
    photo = contents.Photograph(secret, b"\x01" * 16, "a", np.array(index.vectors_ND[0]))
    contents.change(folder, [photo])
    client = TestClient(make_app(Service(folder, CPU)), "http://localhost")
    answer = client.get("/photograph", params={"id": "01" * 16})
    assert answer.status_code == 404 and "no longer where it was" in answer.json()["error"]
    answer = client.get("/photograph", params={"id": "02" * 16})
    assert answer.status_code == 404 and "holds no such" in answer.json()["error"]


def test_the_index_may_grow_while_it_is_served(served: Path, photo: bytes, tmp_path: Path) -> None:
    folder = shutil.copytree(served, tmp_path / "index")
    service = Service(folder, CPU)
    client = TestClient(make_app(service), "http://localhost")
    health = client.get("/healthz").json()
    assert health == {"status": "ok", "photographs": 12, "model": "small", "beside": None}
    (tmp_path / "new.jpg").write_bytes(saved("JPEG"))
    command.add(folder, [tmp_path / "new.jpg"], CPU, quiet=True)
    service.refresh()
    assert client.get("/healthz").json()["photographs"] == 13
    (folder / "index.json").write_text("{")
    service.refresh()
    assert client.post("/search", content=photo).status_code == 200


def test_another_index_in_its_place_is_taken_over_with_its_model(
    served: Path, other: Path, photo: bytes, tmp_path: Path
) -> None:
    """Embedding and neighbours of an answer are always of one model."""
    link, new = tmp_path / "index", tmp_path / "new"
    link.symlink_to(served)
    service = Service(link, CPU)
    client = TestClient(make_app(service), "http://localhost")
    clients = [TestClient(make_app(Service(f, CPU)), "http://localhost") for f in (served, other)]
    before, after = (asked.post("/search", content=photo).json() for asked in clients)
    assert before != after and client.post("/search", content=photo).json() == before
    new.symlink_to(other)
    new.rename(link)
    service.refresh()
    assert client.post("/search", content=photo).json() == after


def test_an_attack_makes_others_the_nearest(
    served: Path, other: Path, photo: bytes, client: TestClient
) -> None:
    """Each model under its own attack; at most eps levels of a pixel change."""
    app = make_app(Service(served, CPU), beside=Service(other, CPU))
    both = TestClient(app, "http://localhost")
    crop = Service(served, CPU).now.read(photo).crop_SSC
    margins = []
    for eps in (0, 8):
        found = both.post(f"/attack?eps={eps}&k=12", content=photo).json()
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["picture"]))))
        assert np.abs(picture.astype(int) - crop).max() == eps
        best = {n["label"]: n["similarity"] for n in reversed(found["neighbours"])}
        margins.append(best["a"] - best["b"])
        plain = both.post("/search?k=12&beside=true", content=photo).json()
        other_found = both.post(f"/attack?eps={eps}&k=12&beside=true", content=photo).json()
        assert (other_found["neighbours"] == plain["neighbours"]) == (eps == 0)
    assert abs(margins[0] - margins[1]) > 0.01 and margins[0] * (margins[1] - margins[0]) < 0
    assert both.get("/healthz").json()["beside"] == "other"
    answer = client.post("/search?beside=true", content=photo)
    assert answer.status_code == 404 and "no second index" in answer.json()["error"]


def test_without_other_classes_an_attack_leads_away(
    photographs: Path, small_run: Path, photo: bytes, tmp_path: Path
) -> None:
    model = open_model(str(small_run), CPU)
    command.build(model, photographs / "a", tmp_path / "index", quiet=True)
    served = Service(tmp_path / "index", CPU).now
    upload = served.read(photo)
    (emb_D,) = served.embed([upload.crop_SSC])
    moved = [
        1 - float(emb_D @ served.embed([served.attack(emb_D, upload, eps)])[0]) for eps in (0, 2, 8)
    ]
    assert moved[0] == pytest.approx(0, abs=1e-6) and moved[0] + 1e-4 < moved[1] < moved[2]


def test_a_sample_is_a_photograph_of_the_index(client: TestClient) -> None:
    """Which then does not find itself."""
    found = client.get("/sample")
    assert found.headers["content-type"] == "image/jpeg"
    digest = blake2b(found.content, digest_size=16).hexdigest()
    near = client.post("/search?k=100", content=found.content).json()["neighbours"]
    assert client.get("/photograph", params={"id": digest}).status_code == 200
    assert len(near) == 11 and digest not in {n["id"] for n in near}


def test_a_sample_can_be_sent(small_run: Path, tmp_path: Path) -> None:
    """An INDEX also holds formats that the service takes from nobody, and files that are gone."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    files = ("a.bmp", "BMP"), ("b.jpg", "GIF"), ("c.png", "PNG"), ("d.jpg", "JPEG")
    for name, format in files:
        (folder / name).write_bytes(saved(format))
    command.build(open_model(str(small_run), CPU), folder, tmp_path / "index", quiet=True)
    client = TestClient(make_app(Service(tmp_path / "index", CPU)), "http://localhost")
    (folder / "d.jpg").unlink()
    for _ in range(12):
        found = client.get("/sample")
        assert found.headers["content-type"] == "image/png"
        assert client.post("/search", content=found.content).status_code == 200
    (folder / "c.png").unlink()
    assert client.get("/sample").status_code == 404


def test_served_recall_is_what_evaluate_reports(
    small_set: Path, small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Test queries against an exact index of the training images, over HTTP."""
    from flowerray.data.source import DataConfig, open_dataset

    assert dispatch(["evaluate", str(small_run), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    dataset = open_dataset(DataConfig(root=small_set), progress=False)
    paths = {split: [dataset.paths[n] for n in rows] for split, rows in dataset.splits.items()}
    label = dict(zip(dataset.paths, dataset.labels_N.tolist(), strict=True))
    for path in paths["train"]:
        (tmp_path / "train" / str(label[path])).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "train" / str(label[path]))
    model = open_model(str(small_run), CPU)
    command.build(model, tmp_path / "train", tmp_path / "index", quiet=True)
    client = TestClient(make_app(Service(tmp_path / "index", CPU)), "http://localhost")
    ranks = []
    for path in paths["test"]:
        found = client.post("/search?k=60", content=path.read_bytes()).json()["neighbours"]
        ranks.append([n["label"] for n in found].index(str(label[path])))
    assert len(ranks) == expected["num_queries"] and len(found) == expected["num_gallery"]
    for k in (1, 5, 10):
        assert np.mean(np.array(ranks) < k) == expected[f"recall_at_{k}"]
    assert 0 < expected["recall_at_5"] < 1


def test_a_token_is_asked_for(served: Path, photo: bytes) -> None:
    client = TestClient(make_app(Service(served, CPU), token="s3cret"), "http://flowers.example")
    assert client.get("/healthz").status_code == 200 and client.get("/").status_code == 200
    for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "s3cret"}):
        for method, path in (("POST", "/search"), ("GET", "/metrics"), ("GET", "/openapi.json")):
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 401 and "token" in answer.json()["error"]
    good = {"authorization": "Bearer s3cret"}
    assert client.post("/search", content=photo, headers=good).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil", ""])
def test_another_name_of_this_machine_is_refused_without_a_token(
    client: TestClient, host: str
) -> None:
    answer = client.get("/healthz", headers={"host": host})
    assert answer.status_code == 403 and "this machine alone" in answer.json()["error"]
    for own in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]", "localhost"):
        assert client.get("/healthz", headers={"host": own}).status_code == 200


def test_a_full_service_says_so_and_goes_on(served: Path, photo: bytes) -> None:
    service = Service(served, CPU)
    door = anyio.Event()

    async def slowly(served: Served, crop: Any) -> Any:
        await door.wait()
        return served.embed([crop])[0]

    async def ask() -> list[int]:
        app = make_app(service, embed=slowly, waiting=4)
        transport = httpx.ASGITransport(app)
        codes: list[int] = []
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

            async def one() -> None:
                answer = await client.post("/search", content=photo)
                codes.append(answer.status_code)
                if answer.status_code == 503:
                    assert answer.headers["retry-after"] == "1" and "full" in answer.json()["error"]
                if len(codes) == 6:
                    door.set()

            async with anyio.create_task_group() as tasks:
                for _ in range(10):
                    tasks.start_soon(one)
            assert (await client.get("/healthz")).status_code == 200
            codes.append((await client.post("/embed", content=photo)).status_code)
        return codes

    codes = anyio.run(ask)
    assert codes == [503] * 6 + [200] * 5


def test_metrics_and_openapi(client: TestClient, photo: bytes) -> None:
    client.post("/embed", content=photo)
    client.post("/embed", content=b"")
    text = client.get("/metrics").text
    assert 'flowerray_requests_total{path="/embed",status="200"}' in text
    assert 'flowerray_requests_total{path="/embed",status="400"}' in text
    assert "flowerray_photographs 12.0" in text and "flowerray_in_flight 1.0" in text
    described = client.get("/openapi.json").json()
    assert {"/embed", "/similar", "/search", "/explain", "/healthz"} <= described["paths"].keys()
    body = described["paths"]["/similar"]["post"]["requestBody"]["content"]
    assert body["multipart/form-data"]["schema"]["required"] == ["image", "other"]
    assert "503" in json.dumps(described["paths"]["/search"]["post"]["responses"])


def test_the_service_fails_in_a_sentence(
    served: Path, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(Service(served, CPU))
    client = TestClient(app, "http://localhost", raise_server_exceptions=False)
    monkeypatch.setattr(Served, "embed", lambda served, crops: 1 / 0)
    answer = client.post("/embed", content=photo)
    assert answer.status_code == 500 and answer.json()["error"].startswith("the service failed")
