"""Clients of a server: what they are told, and Automatic1111's own without its memory."""

import time

import webuiapi

__all__ = ["FreshScripts", "refusal"]


class FreshScripts(webuiapi.WebUIApi):
    """A client that keeps no unit: the library puts them into a dictionary of all its calls."""

    def txt2img(self, *given, **options):
        return super().txt2img(*given, alwayson_scripts={}, **options)

    def img2img(self, *given, **options):
        return super().img2img(*given, alwayson_scripts={}, **options)


def refusal(client, body):
    """Send a picture that cannot be drawn; return what is said, at once or of its job."""
    answer = client.post("/api/v1/pictures", json=body)
    assert "Traceback" not in answer.text
    said = answer.json()
    if answer.status_code != 202:
        assert answer.status_code in (400, 404)
        return said["error"]["message"]
    while (now := client.get(f"/api/v1/pictures/{said['id']}").json())["state"] == "queued":
        time.sleep(0.01)
    return now["error"]["message"]
