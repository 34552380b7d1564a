// The pictures of the next message: files that the user chooses, pastes or drops. Knows no server.

const template = document.querySelector("#picture-template");
const count = new Intl.NumberFormat("en");

/** The pictures of a message not yet sent, shown in `list`; each is `{name, url, element}`, `url` with all its bytes. */
export class Pictures {
  #kept = [];
  #reading = Promise.resolve();

  /** `costs(urls)` promises `[{tokens}]`, `changed()` is called after each change, `tell(sentence)` says what is wrong. */
  constructor(list, { costs, changed, tell }) {
    this.list = list;
    this.costs = costs;
    this.changed = changed;
    this.tell = tell;
  }

  get all() {
    return this.#kept;
  }

  /** Those files which are pictures, in order; resolves once they are shown. */
  add(files) {
    const given = [...files]; // now: what an event or an <input> lists is gone once the event is over
    this.#reading = this.#reading.then(() => this.#read(given));
    return this.#reading;
  }

  /** Resolves once every file given so far is among `all`. */
  ready() {
    return this.#reading;
  }

  /** All of them, which are no longer kept or shown here; their elements go on living. */
  take() {
    const taken = this.#kept;
    this.#kept = [];
    this.list.replaceChildren();
    return taken;
  }

  /** Pictures that `take` gave, back before those that have come since. */
  giveBack(pictures) {
    this.#kept = [...pictures, ...this.#kept];
    this.list.prepend(...pictures.map((picture) => picture.element));
    this.changed();
  }

  async #read(files) {
    const [pictures, others] = [files.filter(isPicture), files.filter((file) => !isPicture(file))];
    const read = await Promise.allSettled(pictures.map(readPicture));
    const fresh = read.filter((result) => result.status === "fulfilled").map((result) => result.value);
    for (const picture of fresh) this.#show(picture);
    this.changed();
    const unread = pictures.filter((_, index) => read[index].status === "rejected");
    if (others.length) this.tell(`${others[0].name} is not a picture.`);
    if (unread.length) this.tell(`${unread[0].name} could not be read.`);
    if (fresh.length) this.#price(fresh);
  }

  #show(picture) {
    picture.element.querySelector(".remove").addEventListener("click", () => this.#remove(picture));
    this.#kept.push(picture);
    this.list.append(picture.element);
  }

  #remove(picture) {
    this.#kept = this.#kept.filter((kept) => kept !== picture);
    picture.element.remove();
    this.changed();
  }

  async #price(pictures) {
    const costs = await this.costs(pictures.map((picture) => picture.url));
    costs.forEach(({ tokens }, index) => {
      pictures[index].element.querySelector(".cost").textContent = `${count.format(tokens)} tokens`;
    });
  }
}

function isPicture(file) {
  return file.type.startsWith("image/");
}

async function readPicture(file) {
  const url = await dataUrl(file);
  const element = template.content.firstElementChild.cloneNode(true);
  element.querySelector("img").src = url;
  element.querySelector("img").alt = file.name;
  element.querySelector(".remove").setAttribute("aria-label", `Remove ${file.name}`);
  return { name: file.name, url, element };
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
