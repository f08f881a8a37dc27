// Starts the page's parts.

import { startMany } from "./many.js";
import { startOne } from "./one.js";
import { ask } from "./server.js";

startOne();
startMany();
ask();
