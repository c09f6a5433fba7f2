(function () {
  "use strict";
  // a link to a feature opens it, also where the browser does not by itself
  function reveal() {
    var target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
    var feature = target && target.closest("details.feature");
    if (feature) {
      feature.hidden = false;
      feature.open = true;
      target.scrollIntoView();
    }
  }
  window.addEventListener("hashchange", reveal);
  reveal();

  // paper cannot be opened: everything shown is opened for it, and closed again
  var closed = [];
  window.addEventListener("beforeprint", function () {
    closed = Array.from(document.querySelectorAll("details:not([open])"));
    closed.forEach(function (one) { one.open = true; });
  });
  window.addEventListener("afterprint", function () {
    closed.forEach(function (one) { one.open = false; });
  });

  var form = document.getElementById("filter");
  if (!form) { return; }
  var words = document.getElementById("words");
  var agreeing = document.getElementById("agreeing");
  var count = document.getElementById("count");
  var features = Array.from(document.querySelectorAll("details.feature"));

  // a number is a whole word, so that 12 does not find 1275
  function holds(text, word) {
    return text.indexOf(/^\d+$/.test(word) ? " " + word + " " : word) >= 0;
  }
  function apply() {
    var asked = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    var shown = 0;
    features.forEach(function (feature) {
      var fits = asked.every(function (word) { return holds(feature.dataset.find, word); });
      feature.hidden = !fits || Boolean(agreeing && agreeing.checked && !feature.classList.contains("agrees"));
      shown += feature.hidden ? 0 : 1;
    });
    count.textContent = shown + " of " + features.length + " shown";
  }
  words.addEventListener("input", apply);
  if (agreeing) { agreeing.addEventListener("change", apply); }
  document.getElementById("open").addEventListener("click", function () {
    features.forEach(function (feature) { if (!feature.hidden) { feature.open = true; } });
  });
  form.hidden = false;
  apply();
})();
