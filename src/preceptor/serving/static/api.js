/** Requests to the API of this server. The token is kept in this module only. */

let token = "";

/** @param {string} value Token of the server. */
export function setToken(value) {
  token = value;
}

/**
 * Send a request and return its response. A form is posted.
 *
 * @param {string} path
 * @param {{form?: FormData, signal?: AbortSignal}} [options]
 * @returns {Promise<Response>}
 * @throws {Error} The sentence of the server if it refuses the request; an AbortError if it was cancelled.
 */
export async function request(path, { form, signal } = {}) {
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  const method = form ? "POST" : "GET";
  const response = await fetch(path, { method, body: form, headers, signal }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Error("the server cannot be reached; is `preceptor serve` still running?");
  });
  if (response.ok) return response;
  const { detail } = await response.json().catch(() => ({}));
  throw new Error(detail ?? `the server answered with status ${response.status}`);
}

/** Post a form and return the JSON of the response; see `request`. */
export async function post(path, form, signal) {
  return (await request(path, { form, signal })).json();
}
