// A link that reproduces a result. All of it stands after the #, which browsers send to nobody.

export function linkTo(result) {
  const fields = new URLSearchParams({
    text: result.text,
    template: result.template,
    seed: result.seed,
    version: result.template_version,
    model: result.model,
  });
  const url = new URL(location.href);
  url.hash = fields.toString();
  return url.href;
}

/** What a link asks for; null where there is none. */
export function readLink(hash) {
  const fields = new URLSearchParams(hash.replace(/^#/, ""));
  if (!fields.get("text")) return null;
  return {
    text: fields.get("text"),
    template: fields.get("template"),
    seed: fields.get("seed") ?? "0",
    version: fields.get("version"),
    model: fields.get("model"),
  };
}

/** In words, how this server differs from the one that the link was made with; "" if not. */
export function differences(wanted, result) {
  const changes = [];
  if (wanted.model && wanted.model !== result.model) {
    changes.push(`the model “${wanted.model}”, and this is “${result.model}”`);
  }
  if (wanted.template && wanted.template !== result.template) {
    changes.push(`the template “${wanted.template}”, and this is “${result.template}”`);
  } else if (wanted.version && wanted.version !== result.template_version) {
    changes.push(
      `version ${wanted.version} of the template, and this is version ${result.template_version}`,
    );
  }
  return changes.length
    ? `The link was made with ${changes.join("; with ")}. The result may differ.`
    : "";
}

/** Put `link` on the clipboard; false where the browser does not let us. */
export async function copy(link) {
  try {
    await navigator.clipboard.writeText(link);
    return true;
  } catch {
    return false;
  }
}
