"""Drives the page of `jlora serve` in a real browser, and takes pictures of it: by hand, since CI has no browser.

Start a server with two adapters at least, and then, with Chromium, its driver and selenium installed (on Debian
`apt-get install chromium chromium-driver` and `pip install selenium`):

    jlora serve --adapters runs --port 8000
    python experiments/serving/page.py http://127.0.0.1:8000 --to pictures

Fails where the page loads anything from elsewhere, logs an error, does not show each adapter's answer as the API gives it, or
is wider than a phone's screen. With `--token` the page must first ask for it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
import urllib.request
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

PROMPT = "Once upon a time there was a little dog"
QUIET = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
         "disable-component-update", "disable-sync")  # fmt: skip
SIZES = {"desk": (1280, 900), "phone": (390, 844)}


def browser(folder, dark):
    options = webdriver.ChromeOptions()
    for flag in ("headless", *QUIET, f"user-data-dir={folder}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # By its path, since selenium otherwise asks the network for one.
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    return driver


def asked(address, token, model, tokens):
    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "seed": 0}
    head = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    call = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), head)
    return json.load(urllib.request.urlopen(call))["choices"][0]["text"]


def set_value(driver, id, value):
    script = (
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))"
    )
    driver.execute_script(script, id, value)


def check(address, token, dark, size, pictures):
    with tempfile.TemporaryDirectory() as folder:
        driver = browser(folder, dark)
        try:
            name = f"{size}-{'dark' if dark else 'light'}"
            driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                dict(zip(("width", "height"), SIZES[size])) | {"deviceScaleFactor": 1, "mobile": size == "phone"},
            )
            drive(driver, address, token, pictures / name)
            width = driver.execute_script("return document.documentElement.scrollWidth")
            assert width <= SIZES[size][0], f"{name}: {width} pixels wide"
            check_traffic(driver, address, 2 if token else 0)
        finally:
            driver.quit()
    print(f"{name}: right")


def drive(driver, address, token, picture):
    driver.get(address)
    wait = WebDriverWait(driver, 120)
    if token:
        wait.until(lambda d: d.find_element(By.ID, "token").is_displayed())
        driver.save_screenshot(f"{picture}-token.png")
        driver.find_element(By.ID, "token").send_keys("wrong")
        driver.find_element(By.ID, "unlock").click()
        wait.until(lambda d: "not this server's token" in d.find_element(By.ID, "note").text)
        driver.find_element(By.ID, "token").clear()
        driver.find_element(By.ID, "token").send_keys(token)
        driver.find_element(By.ID, "unlock").click()
    boxes = wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "#models input"))
    names = [box.get_attribute("value") for box in boxes]
    assert len(names) >= 3, f"wanted a server with two adapters at least, got {names}"
    for box in boxes:
        if not box.is_selected():
            box.find_element(By.XPATH, "..").click()
    driver.find_element(By.ID, "text").find_element(By.XPATH, "..").click()
    driver.find_element(By.ID, "prompt").send_keys(PROMPT)
    driver.find_element(By.TAG_NAME, "summary").click()
    set_value(driver, "temperature", "0")
    set_value(driver, "max", "40")
    driver.save_screenshot(f"{picture}-asked.png")
    driver.find_element(By.ID, "go").click()
    wait.until(lambda d: len(d.find_elements(By.CSS_SELECTOR, ".answer")) == len(names))
    wait.until(lambda d: not d.find_elements(By.CSS_SELECTOR, ".answer.runs"))
    driver.execute_script("document.getElementById('answers').scrollIntoView()")
    driver.save_screenshot(f"{picture}-answered.png")
    for answer in driver.find_elements(By.CSS_SELECTOR, ".answer"):
        model = answer.find_element(By.TAG_NAME, "h2").text
        shown = answer.find_element(By.CLASS_NAME, "text").get_property("textContent")
        wanted = PROMPT + asked(address, token, model, 40)
        assert shown == wanted, f"{model}: the page shows {shown!r}, the API says {wanted!r}"
        assert "40 tokens" in answer.text or "came to its end" in answer.text, answer.text
    stop_midway(driver, wait)


def stop_midway(driver, wait):
    """Stop ends what is being written, and the next question is answered."""
    set_value(driver, "max", "400")
    driver.find_element(By.ID, "go").click()
    wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, ".answer.runs"))
    driver.find_element(By.ID, "halt").click()
    wait.until(lambda d: not d.find_elements(By.CSS_SELECTOR, ".answer.runs"))
    assert driver.find_element(By.ID, "go").is_enabled()


def check_traffic(driver, address, refusals):
    """Nothing but this server was asked, and nothing went wrong but the calls without a token."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    # The browser opens its own first page before this one.
    elsewhere = [url for url in asked if not url.startswith((address, "data:", "chrome:"))]
    assert asked and not elsewhere, elsewhere
    errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert len(errors) == refusals, errors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--token")
    parser.add_argument("--to", type=Path, required=True, help="folder for the pictures")
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for size in SIZES:
        for dark in (False, True):
            check(arguments.address.rstrip("/"), arguments.token, dark, size, arguments.to)
    print(f"the page is right in {len(SIZES) * 2} views ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main()
