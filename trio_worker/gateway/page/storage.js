// What the browser keeps, and a stand-in that lasts as long as the page where it keeps nothing.

class Kept {
  lasting = true;
  #storage;

  constructor(storage) {
    this.#storage = storage;
  }

  keys() {
    return Object.keys(this.#storage);
  }

  getItem(key) {
    return this.#storage.getItem(key);
  }

  /** Throws where there is no more room. */
  setItem(key, value) {
    this.#storage.setItem(key, value);
  }

  removeItem(key) {
    this.#storage.removeItem(key);
  }
}

class Passing {
  lasting = false;
  #items = new Map();

  keys() {
    return [...this.#items.keys()];
  }

  getItem(key) {
    return this.#items.get(key) ?? null;
  }

  setItem(key, value) {
    this.#items.set(key, value);
  }

  removeItem(key) {
    this.#items.delete(key);
  }
}

function opened(name) {
  try {
    return new Kept(window[name]);
  } catch {
    return new Passing(); // Refused by a setting of the browser.
  }
}

export const local = opened("localStorage");
export const session = opened("sessionStorage");
