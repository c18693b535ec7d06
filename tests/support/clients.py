"""Clients of a server: what they are told, and Automatic1111's own without its memory."""

import base64
import io
import time

import webuiapi

__all__ = [
    *("FreshScripts", "base64_of", "bytes_of"),
    *("fetched", "finished", "refusal", "submitted"),
]


class FreshScripts(webuiapi.WebUIApi):
    """A client that keeps no unit: the library puts them into a dictionary of all its calls."""

    def txt2img(self, *given, **options):
        return super().txt2img(*given, alwayson_scripts={}, **options)

    def img2img(self, *given, **options):
        return super().img2img(*given, alwayson_scripts={}, **options)


def bytes_of(image, **more):
    """Return a picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", **more)
    return file.getvalue()


def base64_of(image, **more):
    return base64.b64encode(bytes_of(image, **more)).decode()


def submitted(client, path="pictures", **body):
    """Ask for something; return its job's name."""
    answer = client.post(f"/api/v1/{path}", json=body)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def finished(client, job):
    """Wait until a job is over; return what is said of it."""
    while (said := client.get(f"/api/v1/pictures/{job}").json())["state"] in ("queued", "running"):
        time.sleep(0.01)
    return said


def fetched(client, job):
    """Return the file of a job's first picture, and what is said of it."""
    said = finished(client, job)
    assert said["state"] == "done", said
    return client.get(f"/api/v1/pictures/{job}/image/0").content, said["pictures"][0]


def refusal(client, body):
    """Send a picture that cannot be drawn; return what is said, at once or of its job."""
    answer = client.post("/api/v1/pictures", json=body)
    assert "Traceback" not in answer.text
    said = answer.json()
    if answer.status_code != 202:
        assert answer.status_code in (400, 404)
        return said["error"]["message"]
    return finished(client, said["id"])["error"]["message"]
