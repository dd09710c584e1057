/* The playground's modules.

   A page that is opened from a file may load neither JavaScript modules nor a worker's file.  So
   each file here is a classic script that gives `playground.define` one function, and that function
   adds names to `lib`.  The worker runs the same functions: `playground.source` is their text.  A
   function may therefore use `lib` and nothing else from outside. */
"use strict";
const playground = {
  lib: {},
  parts: [],
  define(part) {
    this.parts.push(part);
    part(this.lib);
  },
  get source() {
    return `"use strict"; const lib = {};\n${this.parts.map(part => `(${part})(lib);`).join("\n")}`;
  },
};
