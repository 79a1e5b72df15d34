// Changes of points, one after the other: each is made for the revision that the page has, and its answer is shown.

import { post, Refused } from "./api.js";

export class Edits {
  // `page`: state() the shown image's, show(state), count(state), refresh(), said(text), fail(error)
  constructor(page) {
    this.page = page;
    this.last = Promise.resolve();
  }

  // Run after all that was asked for before; resolves to the result, or null where it was refused.
  queue(work) {
    this.last = this.last.then(work).catch((error) => this.failed(error));
    return this.last;
  }

  // `first` sees the answer before it is shown.
  change(what, values, first = () => {}) {
    const { row } = this.page.state();
    return this.queue(async () => {
      const state = this.page.state();
      if (state.row !== row) return null; // another image was opened meanwhile
      const body = { row, revision: state.revision, what, ...values };
      const after = await post("/api/edit", body);
      if (this.page.state().row !== row) {
        this.page.count(after);
        return null; // another image was opened while the answer was on its way
      }
      first(after);
      this.page.show(after);
      return after;
    });
  }

  // way: "undo" or "redo"
  back(way) {
    return this.queue(async () => {
      const { row, [way]: step } = this.page.state();
      if (!step) {
        this.page.said(`nothing to ${way}`);
        return null;
      }
      const after = await post(`/api/${way}`, { number: step.number });
      if (this.page.state().row === row) await this.page.show(after);
      else this.page.count(after);
      this.page.said(`${way}: ${step.what}, ${step.image}`);
      return after;
    });
  }

  async failed(error) {
    this.page.fail(error);
    if (error instanceof Refused && error.status !== 500) await this.page.refresh();
    return null;
  }
}
