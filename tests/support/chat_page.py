"""A real Chromium and the chat page in it, as its reader uses it. Knows no server but the address it is given."""

import shutil

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from support.processes import PATIENCE

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --force-prefers-reduced-motion""".split()  # what fades in has no text yet


def start_chromium(folder):
    """A headless Chromium which keeps its profile in `folder` and its console for `Page.complaints`."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={folder}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


class Page:
    """What a reader can do and see."""

    def __init__(self, browser, url):
        self.browser, self.url = browser, url

    def open(self):
        """Anew: without a key, nothing written, nothing in the console."""
        self.browser.get(self.url)
        if self.script("return sessionStorage.length"):
            self.script("sessionStorage.clear()")
            self.browser.refresh()
        self.complaints()

    def complaints(self):
        """What the console holds, but for the answers 400, 401, … that the server gave on purpose."""
        return [entry for entry in self.browser.get_log("browser") if entry["source"] != "network"]

    def find(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.find(selector).text.replace("\xa0", " ")

    def script(self, source, *arguments):
        return self.browser.execute_script(source, *arguments)

    def until(self, promise, seconds=PATIENCE):
        return WebDriverWait(self.browser, seconds, 0.02).until(lambda _: promise())

    def write(self, words):
        self.find("#words").send_keys(words)

    def ask(self, words, exchange=1):
        """Send `words` and wait for the end of the answer, which is the conversation's `exchange`-th."""
        self.write(words + Keys.ENTER)
        self.until(lambda: len(self.all(".exchange")) == exchange and self.is_idle())

    def is_idle(self):
        return self.find("#send").get_attribute("aria-label") == "Send"

    def choose(self, *files):
        self.find("#files").send_keys("\n".join(map(str, files)))

    def shows(self, selector):
        return any(element.is_displayed() for element in self.all(selector))

    def emulated(self, command, **values):
        """A setting of another device, by Chromium's name for it, such as setEmulatedMedia."""
        self.browser.execute_cdp_cmd(f"Emulation.{command}", values)

    def allow_clipboard(self):
        allowed = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": self.url}
        self.browser.execute_cdp_cmd("Browser.grantPermissions", allowed)
