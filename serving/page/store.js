// What this browser keeps: requests and their pictures, in IndexedDB, so that a reload finds them.

const NAME = "latentrt";
const TABLE = "requests";

/** The records of this browser; without IndexedDB they live as long as the page. */
export class Store {
  #database;

  /** Opens the store. */
  static async open() {
    const store = new Store();
    try {
      store.#database = await openDatabase();
    } catch {
      store.#database = null; // forbidden by the browser's settings
    }
    return store;
  }

  /** Returns all records, the oldest first. */
  async all() {
    const records = (await this.#do("readonly", (table) => table.getAll())) ?? [];
    return records.sort((one, other) => one.created - other.created);
  }

  /** Keeps a record. */
  async put(record) {
    const pictures = record.pictures.map(({ preview, ...kept }) => kept);
    await this.#do("readwrite", (table) => table.put({ ...record, pictures }));
  }

  /** Lets a record go. */
  async remove(key) {
    await this.#do("readwrite", (table) => table.delete(key));
  }

  #do(mode, act) {
    if (this.#database === null) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const transaction = this.#database.transaction(TABLE, mode);
      const request = act(transaction.objectStore(TABLE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = transaction.onerror = () => reject(transaction.error);
    });
  }
}

function openDatabase() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "key" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
